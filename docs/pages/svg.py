"""What the committed pictures are drawn with, light and dark."""

from html import escape
from typing import NamedTuple

FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"


class Theme(NamedTuple):
    ink: str
    muted: str
    line: str
    ours: str
    other: str
    box: str


THEMES = {
    "light": Theme("#1f2328", "#59636e", "#d1d9e0", "#2f6fb7", "#c3cad2", "#f6f8fa"),
    "dark": Theme("#f0f6fc", "#9198a1", "#3d444d", "#5b9dee", "#59636e", "#151b23"),
}


def text(x: float, y: float, said: str, colour: str, size: int = 14, more: str = "") -> str:
    return f"<text x='{x:g}' y='{y:g}' fill='{colour}' font-size='{size}' {more}>{escape(said)}</text>"


def bar(x: float, y: float, width: float, colour: str) -> str:
    return f"<rect x='{x:g}' y='{y:g}' width='{width:.1f}' height='15' rx='2' fill='{colour}'/>"


def framed(width: int, height: int, title: str, parts: list[str]) -> str:
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img' {FONT}>"
    return "\n".join([head, f"<title>{escape(title)}</title>", *parts, "</svg>"]) + "\n"

"""A headless Chromium of this machine, if it has one: what a page looks like there."""

import html
import os
import re
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MISSING = f"no browser: none of {', '.join(NAMES)} in PATH, none in PLAYWRIGHT_BROWSERS_PATH"
# Written into a copy of the page, in a frame: what lies outside of it, what is shown, and how it contrasts.
PROBE = """
<script>
addEventListener("load", () => {
  const shown = e => e.getClientRects().length > 0;
  const all = [...document.querySelectorAll("main *")].filter(shown);
  const wide = all.filter(e => !e.closest("svg") && e.getBoundingClientRect().right > innerWidth + 1);
  const text = [...document.querySelectorAll("svg text")].filter(shown);
  const box = t => t.getBoundingClientRect();
  const out = text.filter(t => box(t).left < -1 || box(t).right > innerWidth + 1);
  const sizes = text.map(t => box(t).height);
  const style = getComputedStyle(document.body);
  parent.document.title = JSON.stringify({
    scroll: document.documentElement.scrollWidth, window: innerWidth, height: document.documentElement.scrollHeight,
    wide: wide.map(e => e.tagName), out: out.map(t => t.textContent), smallest: Math.min(...sizes),
    desk: document.querySelectorAll(".desk").length && shown(document.querySelector(".desk")),
    phone: document.querySelectorAll(".phone").length && shown(document.querySelector(".phone")),
    ink: style.color, paper: style.backgroundColor, drawn: getComputedStyle(text[0]).fill,
  });
});
</script>
"""


def found() -> str | None:
    for name in NAMES:
        if path := shutil.which(name):
            return path
    folder = os.environ.get("PLAYWRIGHT_BROWSERS_PATH")
    inside = sorted(Path(folder).glob("chromium*/*/*")) if folder else []
    return next((str(path) for path in inside if re.fullmatch(r"chrome|headless_shell", path.name)), None)


def framed(page: str, width: int) -> str:
    """A page in a frame of that width, which may be less than that of any window, that tells what PROBE finds."""
    probed = html.escape(page.replace("</body>", f"{PROBE}</body>"))
    return f'<!DOCTYPE html><title></title><iframe style="width: {width}px; height: 900px" srcdoc="{probed}"></iframe>'


def ran(browser: str, folder: Path, page: Path, width: int, height: int, dark: bool, *options: str) -> str:
    """What it prints of a page in a window of that size."""
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},{height}",
        f"--user-data-dir={folder / 'data'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--virtual-time-budget=2000", *options, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout

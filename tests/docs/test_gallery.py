"""The gallery: its pictures are there in both schemes, whole and alike but for their colours, and say what is so."""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from paths import ROOT

sys.path.insert(0, str(ROOT / "docs"))
pages = pytest.importorskip("pages", reason="matplotlib is not installed")
from pages import compared, gallery  # noqa: E402

SHOWN = re.findall(r"^<!-- gallery: (\w+) -->$", (ROOT / "docs" / "gallery.md").read_text(), re.M)
XMLNS = re.compile(r"xmlns(:\w+)?=[\"'][^\"']*[\"']|<!DOCTYPE[^>]*>")


def words(path: Path) -> str:
    text = " ".join("".join(ElementTree.parse(path).getroot().itertext()).split())
    return re.sub(r"\.[\w-]+ \{[^}]*\}", "", text)


def test_the_page_shows_what_there_is():
    there = {path.name for path in gallery.GALLERY.glob("*")}
    assert there == {f"{name}-{theme}.svg" for name in SHOWN for theme in gallery.THEMES} and len(SHOWN) == 6


@pytest.mark.parametrize("name", SHOWN)
def test_a_picture_is_whole_in_both_schemes(name):
    light, dark = (gallery.GALLERY / f"{name}-{theme}.svg" for theme in ("light", "dark"))
    for path in (light, dark):
        text = XMLNS.sub("", path.read_text())
        assert not re.search(r"https?://|@font-face|@import|<image|<script", text)
        assert len(text) < 400_000 and not re.search(r"url\((?!#|'#|\"#)", text)
    assert light.read_text() != dark.read_text()
    drawn = [[element.tag for element in ElementTree.parse(path).iter()] for path in (light, dark)]
    assert drawn[0] == drawn[1] and words(light).replace(" ", "") == words(dark).replace(" ", "")


def test_the_wrong_loss_is_diagnosed_as_the_picture_says():
    found = gallery.parity(Path())["parity"]["light"]
    said = "exclusive instead of inclusive prefix".replace(" ", "")
    for text in (found, (gallery.GALLERY / "parity-light.svg").read_text()):
        assert said in re.sub(r"&#160;|\s", "", text) and "differs" in text


def test_what_is_compared_adds_up():
    picture = compared.aggregations()
    whole = {curve.label: curve.slope for curve in picture.curves}
    assert set(whole) == set(compared.AGGREGATIONS)
    for name in ("token-mean", "seq-mean-token-mean", "group-mean"):
        torch.testing.assert_close(whole[name].sum(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-6, atol=0)
    share = compared.advantages().x.double()
    for right, wrong in ((curve.value, curve.slope) for curve in compared.advantages().curves):
        torch.testing.assert_close(share * right + (1 - share) * wrong, torch.zeros_like(share), rtol=0, atol=1e-6)

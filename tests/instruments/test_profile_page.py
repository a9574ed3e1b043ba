"""The page of a profile: whole, without anything from elsewhere, and right at a desk and on a phone, light and dark."""

import html
import json
import re
from xml.etree import ElementTree

import browsers
import pytest
import torch

import tokenrl
from tokenrl.instruments.parity import random_batch
from tokenrl.instruments.profiling import figures, report
from tokenrl.instruments.profiling.accounts import Span
from tokenrl.instruments.ratios import by_position

pytestmark = pytest.mark.usefixtures("known_limits")
FIGURES = ("roofline", "timeline", "memory", "ratios")


@pytest.fixture
def profile():
    batch = random_batch(0, "ctpo", head="hidden", kl_coef=0.1)
    weight = batch.tensors["weight"].requires_grad_()
    with tokenrl.profile() as p:
        loss, _ = batch.loss()
        loss.backward()
    assert weight.grad.any()
    return p


@pytest.fixture
def page(profile, tmp_path):
    path = tmp_path / "report.html"
    note = report.Section("beside", "Beside <others>", "a & b", head=("way", "ms"), rows=[report.Row(["eager", "1"])])
    profile.html(path, "A step & its <cost>", [note])
    return path


def test_it_is_whole_and_needs_nothing_else(page, profile):
    text = page.read_text()
    tree = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))
    assert not re.search(r"https?:|//|<script|<link|<img|@import|src=", re.sub(r"<title>.*?</title>", "", text))
    assert {target[0] for target in re.findall(r"(?:href=\"|url\()([^\")]+)", text)} == {"#"}
    ids = [element.get("id") for element in tree.iter() if element.get("id")]
    assert len(ids) == len(set(ids)) and {*FIGURES, "ops", "machine", "beside"} <= set(ids)
    pointed = set(re.findall(r"(?:href=\"|url\()#([^\")]+)", text))
    assert pointed and pointed <= set(ids)
    sections = {section.get("id"): section for section in tree.iter("section")}
    for name in FIGURES:
        drawn = [svg for svg in sections[name].iter("svg")]
        assert len(drawn) == 2 and all(len(list(svg.iter("path"))) > 5 for svg in drawn), name
        assert [div.get("class") for div in sections[name].iter("div")] == ["desk", "phone"]
    rows = [row for row in sections["ops"].iter("tr")][1:]
    shown = ["".join(row[0].itertext()) for row in rows]
    assert len(rows) == len(profile.lines)
    for line, text_of_row in zip(profile.lines, shown, strict=True):
        assert line.what in text_of_row and figures_of(line) in text_of_row
    assert html.escape("A step & its <cost>") in text and "Beside &lt;others&gt;" in text
    assert str(torch.get_num_threads()) in "".join(sections["machine"].itertext())


def figures_of(line):
    return "x".join(map(str, line.shape))


def test_colours_have_names_that_both_schemes_define(page):
    text = page.read_text()
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    assert not re.findall(r"#[0-9a-f]{6}", drawn)
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    light, dark = text.split("prefers-color-scheme: dark")
    for scheme in (light, dark.split("}\n}")[0]):
        assert used <= set(re.findall(r"--([\w-]+):", scheme))


def test_every_kernel_is_on_the_roofline_with_its_number(profile, page):
    points = figures.points(profile.lines)
    assert {point.line.what for point in points} >= {
        f"{op} {way}"
        for op in ("linear_token_logprobs", "token_logprobs", "objective")
        for way in ("forward", "backward")
    }
    for point in points:
        assert profile.lines[point.number - 1] is point.line
        assert point.rate == pytest.approx(point.intensity * point.line.bytes / point.line.seconds)
    drawn = figures.roofline(profile.lines, profile.machine)["desk"]
    labels = " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", drawn))
    assert all(re.search(rf"\b{point.number}\b", labels) for point in points)


def test_ratios_by_position_are_those_of_the_batch(profile):
    batch = random_batch(0, "ctpo", head="hidden", kl_coef=0.1)
    found, valid = profile.ratios, batch.tensors["mask"]
    assert found.tokens == by_position(batch).tokens
    assert found.objective == "ctpo" and sum(found.tokens) == int(valid.sum())
    logp = batch.log_probs("reference").detach()
    x = torch.where(valid, logp - batch.tensors["old_logp"], 0)
    ratio = x.cumsum(1).clamp(max=10).exp()
    first = valid & (valid.cumsum(1) == 1)
    assert found.quantiles[0.5][0] == pytest.approx(torch.quantile(ratio[first], 0.5).item(), rel=1e-5)
    metrics = batch.loss()[1]
    for name in ("low", "high", "dual"):
        shares = sum(share * count for share, count in zip(getattr(found, name), found.tokens, strict=True))
        assert shares / sum(found.tokens) == pytest.approx(getattr(metrics, f"clip_{name}"), abs=1e-6)


def test_ratios_of_a_loss_from_hidden_states_with_an_entropy():
    batch = random_batch(0, "ctpo", head="hidden", entropy_coef=0.1)
    given = {name: batch.tensors[name] for name in ("hidden", "weight", "ids", "old_logp", "advantages", "mask")}
    with tokenrl.profile() as p:
        tokenrl.linear_policy_loss("ctpo", **given, **batch.settings)
    expected = by_position(batch)
    assert p.ratios.tokens == expected.tokens
    assert p.ratios.quantiles[0.95] == pytest.approx(expected.quantiles[0.95], rel=1e-5)


def test_without_a_loss_it_says_so(tmp_path):
    with tokenrl.profile() as p:
        tokenrl.token_logprobs(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    p.html(tmp_path / "page")
    assert "the step called no loss" in (tmp_path / "page").read_text()


def test_without_matplotlib_it_says_what_to_install(profile, tmp_path, monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else name)
    with pytest.raises(ValueError, match=r"^html: got no matplotlib, accepted: .* \(pip install tokenrl\[demo\]\)"):
        profile.html(tmp_path / "page")


def test_close_spans_are_drawn_as_one_and_ours_are_taken_out():
    spans = [Span("a", 0.0, 1.0, 0), Span("b", 1.001, 2.0, 0), Span("c", 3.0, 4.0, 0)]
    assert figures.merged(spans, 0.01) == [(0, 2000), (3000, 1000)]
    assert figures.without([(0, 10), (20, 5)], [(2, 3), (8, 14)]) == [(0, 2), (5, 3), (22, 3)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(page, tmp_path, width, scheme):
    """Nothing lies beside the window; the figures are those for its width, and the letters in them can be read."""
    browser = browsers.found()
    if browser is None:
        pytest.skip(browsers.MISSING)
    probed = tmp_path / "probed.html"
    probed.write_text(browsers.framed(page.read_text(), width))
    dom = browsers.ran(browser, tmp_path, probed, 1400, 1000, scheme == "dark", "--dump-dom")
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom, re.S)[1]))
    assert seen["window"] == width and seen["scroll"] <= width
    assert not seen["wide"] and not seen["out"] and seen["smallest"] > 9
    assert (bool(seen["desk"]), bool(seen["phone"])) == (width > 700, width <= 700)
    ink, paper = (luminance(seen[name]) for name in ("ink", "paper"))
    assert seen["drawn"] == seen["ink"] and (ink > paper) == (scheme == "dark")
    assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 7
    shot = tmp_path / "shot.png"
    browsers.ran(browser, tmp_path, page, width, seen["height"], scheme == "dark", f"--screenshot={shot}")
    from matplotlib import image

    pixels = image.imread(shot)
    assert pixels.shape[:2] == (seen["height"], width)
    corner = [round(255 * x) for x in pixels[2, 2, :3]]
    assert corner == [int(x) for x in re.findall(r"\d+", seen["paper"])]
    assert (abs(pixels[..., :3] - pixels[2, 2, :3]).max(-1) > 0.3).mean() > 0.005


def luminance(colour):
    """Relative, of an rgb(...); as WCAG 2 defines it."""
    parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

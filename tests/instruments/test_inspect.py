"""tokenrl inspect: numbers against loops over the tokens; the tables at 80 columns; every kind of batch, and damage."""

import json
import re

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tokenrl
from tokenrl import cli
from tokenrl.instruments.inspection import numbers, picture

G = torch.Generator().manual_seed(0)
MASK = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 1, 0]]).bool()


def of_logits(path, **more):
    logits, ids = torch.randn(4, 6, 11, generator=G), torch.randint(0, 11, (4, 6), generator=G)
    with tokenrl.record(path, source={"host": "a test of rather many words that go on and on" * 3}):
        logp = tokenrl.token_logprobs(logits, ids, temperature=0.8).logp
        old, ref, rollout = (logp + s * torch.randn(4, 6, generator=G) for s in (0.3, 0.2, 0.1))
        given = {"mask": MASK, "ref_logp": ref, "kl_coef": 0.1, "rollout_logp": rollout} | more
        tokenrl.policy_loss(tokenrl.objective("grpo", eps_high=0.3), logp, old, torch.tensor([1.0, -1, 2, -2]), **given)
    return path


def long_with_holes(path):
    """Four sequences of up to 4096 tokens, whose masks have holes; log-probs alone."""
    old = -3 * torch.rand(4, 4096, generator=G) - 0.1
    mask = (torch.arange(4096) < torch.tensor([[4096], [3000], [700], [1]])) & (torch.rand(4, 4096, generator=G) > 0.1)
    mask[:, 0] = True
    logp = torch.where(mask, old + 0.03 * torch.randn(old.shape, generator=G), torch.nan)
    with tokenrl.record(path):
        tokenrl.policy_loss("ctpo", logp, old, torch.tensor([1.0, -1, 0.5, -0.5]), mask=mask)
    return path


def packed(path):
    lengths = [5, 0, 9, 2]
    old = torch.randn(sum(lengths), generator=G) / 3 - 3
    cu, segments = torch.tensor([0, *lengths]).cumsum(0), torch.arange(sum(lengths)) // 3
    hidden, weight = torch.randn(sum(lengths), 7, generator=G), torch.randn(13, 7, generator=G)
    ids, advantages = torch.randint(0, 13, (sum(lengths),), generator=G), torch.tensor([1.0, 2, -1, 0])
    more = {"cu_seqlens": cu, "segment_ids": segments, "advantages_per": "sequence"}
    with tokenrl.record(path):
        tokenrl.linear_policy_loss("sspo", hidden, weight.requires_grad_(), ids, old, advantages, **more)
    return path


def empty(path):
    with tokenrl.record(path):
        logp = torch.zeros(2, 3)
        tokenrl.policy_loss("grpo", logp, logp, torch.zeros(2), mask=torch.zeros(2, 3, dtype=torch.bool))
    return path


def of_nothing(path):
    with tokenrl.record(path):
        nothing = torch.zeros(0)
        tokenrl.policy_loss("ctpo", nothing, nothing, nothing, cu_seqlens=torch.tensor([0]))
    return path


KINDS = {"logits": of_logits, "long": long_with_holes, "packed": packed, "empty": empty, "nothing": of_nothing}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    return {name: make(folder / f"{name}.safetensors") for name, make in KINDS.items()}


@pytest.fixture(scope="module")
def found(recorded):
    return {name: numbers.inspected(tokenrl.load_batch(path)) for name, path in recorded.items()}


def called(*arguments, width: int = 80):
    return CliRunner().invoke(cli.application(), ["inspect", *map(str, arguments)], env={"COLUMNS": str(width)})


def test_lengths_and_holes_by_hand(found):
    counts = found["logits"].numbers
    assert counts["lengths"] == {"min": 0, "median": 3, "mean": 3, "max": 6} and counts["empty_sequences"] == 1
    assert counts["holes"] == {"tokens": 1 + 2, "sequences": 2, "before": 1, "after": 1 + 6 + 1}
    assert (counts["sequences"], counts["cells"], counts["tokens"], counts["layout"]) == (4, 24, 12, "padded")
    flat = found["packed"].numbers
    assert flat["lengths"] == {"min": 0, "median": 3.5, "mean": 4, "max": 9} and flat["layout"] == "packed"
    assert flat["holes"] == {"tokens": 0, "sequences": 0, "before": 0, "after": 0}


@pytest.mark.parametrize("name", ["logits", "long", "packed"])
def test_positions_and_quantiles_by_loops(found, name):
    one = found[name]
    layout, valid = one.batch.layout, one.valid.tolist()
    expected, ends = [], layout.cu_seqlens.tolist()
    for begin, end in zip(ends, ends[1:], strict=False):
        count = 0
        for at in range(begin, end):
            count += valid[at]
            expected.append(count if valid[at] else 0)
    assert one.position.tolist() == expected
    ratio, position = one.log_ratio.exp().numpy(), numpy.array(expected)
    tokens = 0
    for row in one.numbers["ratio_quantiles"]:
        inside = ratio[(position >= row["from"]) & (position <= row["to"])]
        assert row["tokens"] == inside.size and row["quantiles"] == numpy.quantile(inside, numbers.QUANTILES).tolist()
        tokens += inside.size
    assert tokens == one.numbers["tokens"]
    r = ratio[position > 0]
    assert one.numbers["ess"] == pytest.approx(r.sum() ** 2 / (r.size * (r * r).sum()))


def test_the_ratio_that_is_clipped_has_quantiles_of_its_own(found):
    one = found["long"]
    prefix = one.log_ratio.view(4, -1).cumsum(1).clamp(max=10).exp().view(-1)  # ctpo's, of clamped ratios
    rows = one.numbers["own_ratio_quantiles"]
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in one.numbers["ratio_quantiles"]]
    for row in rows:
        inside = prefix[(one.position >= row["from"]) & (one.position <= row["to"])].numpy()
        assert row["quantiles"] == pytest.approx(numpy.quantile(inside, numbers.QUANTILES).tolist(), rel=1e-4)
    assert found["logits"].numbers["own_ratio_quantiles"] == []


def test_bins_cover_every_position_once():
    for length in (0, 1, 2, 7, 8, 1000):
        for bins in (numbers.powers(length), numbers.even_bins(length, 64)):
            assert [p for first, last in bins for p in range(first, last + 1)] == list(range(1, length + 1))
    assert len(numbers.even_bins(4096, 64)) == 64


def test_kl_estimates_by_their_formulas(found):
    one = found["logits"]
    old, ref, rollout = (one.batch.tensors[name].double()[MASK] for name in ("old_logp", "ref_logp", "rollout_logp"))
    new = one.logp.double()[MASK]
    for pair, (p, q) in {
        "old || new": (old, new),
        "new || reference": (new, ref),
        "rollout || old": (rollout, old),
    }.items():
        s = p - q
        expected = {"k1": s.mean(), "k2": (s * s / 2).mean(), "k3": ((-s).exp() - 1 + s).mean()}
        assert one.numbers["kl"][pair] == pytest.approx({name: float(x) for name, x in expected.items()}, rel=1e-6)
    assert found["packed"].numbers["kl"].keys() == {"old || new"}


@pytest.mark.parametrize("name", ["logits", "long", "packed"])
def test_shares_of_clipped_tokens_are_those_of_the_losses(found, name):
    one = found[name]
    rows = {row["name"]: row for row in one.numbers["objectives"]}
    wanted = {name for name, row in tokenrl.OBJECTIVES.items() if not name.startswith("kl_") or name == "kl_cov"}
    assert set(rows) == wanted | {f"{one.batch.objective.name}, recorded"}
    ran = 0
    for row, values in rows.items():
        objective = one.batch.objective if "recorded" in row else row
        try:
            metrics = one.batch.loss(objective, logp=one.logp)[1]
        except ValueError as error:
            if "reason" in values:
                assert values["reason"] == str(error).splitlines()[0]
            continue
        ran += 1
        if row == "clip_cov":  # draws its tokens
            continue
        for clip in (*numbers.CLIPS, "ratio_mean", "ess"):
            assert values[clip] == pytest.approx(getattr(metrics, clip), rel=1e-5, nan_ok=True), (row, clip)
        if values["clipped"] is not None:
            assert max(values[clip] for clip in numbers.CLIPS) <= values["clipped"] + 1e-12
    assert ran > 35


def test_clip_shares_by_position_add_up(found):
    one = found["long"]
    metrics = numbers.clipped_tokens(one.batch.objective, one.batch, one.logp, None)
    hit = metrics.clip_low.reshape(-1)
    bins = numbers.even_bins(numbers.longest(one.position), 50)
    for row in picture.shares(hit, one.position, bins):
        inside = (one.position >= row["from"]) & (one.position <= row["to"])
        assert row["share"] == pytest.approx(float(hit[inside].double().mean()))


@pytest.mark.parametrize("name", KINDS)
def test_the_tables_fit_80_columns(recorded, name):
    outcome = called(recorded[name])
    assert outcome.exit_code == 0, outcome.output
    lines = outcome.output.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in outcome.output and "nan" not in outcome.output
    header = next((line for line in lines if "tokens clipped, %" in line), None)
    if header is not None:  # every row of the table has a cell per column
        at = lines.index(header)
        rows = lines[at + 2 : at + 2 + next(k for k, line in enumerate(lines[at + 2 :]) if not line.strip())]
        assert rows and all(len(re.split(r" {2,}", line.strip())) == 7 for line in rows), rows
    else:
        assert name in ("empty", "nothing")


def test_what_the_text_says(recorded):
    text = " ".join(called(recorded["logits"]).output.split())
    assert "objective grpo with eps_high=0.3; padded, 4 sequences (1 without a token), 12 of 24 tokens valid" in text
    assert "the mask leaves out: 3 holes in 2 sequences, 1 before the first token, 8 after the last" in text
    assert "real cannot run: group_ids: got None" in text and "rollout || old" in text


@pytest.mark.parametrize("name", KINDS)
def test_json_is_the_numbers(recorded, found, name):
    outcome = called(recorded[name], "--json")
    parsed = json.loads(outcome.stdout)
    assert parsed["tensors"] == found[name].numbers["tensors"] and parsed["lengths"] == found[name].numbers["lengths"]
    assert [row["name"] for row in parsed["objectives"]] == [row["name"] for row in found[name].numbers["objectives"]]
    assert parsed["path"] == str(recorded[name])


@pytest.mark.parametrize("name", KINDS)
def test_the_picture_is_drawn(recorded, name, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    outcome = called(recorded[name], "--out", tmp_path / "picture.png")
    assert outcome.exit_code == 0, outcome.output
    image = (tmp_path / "picture.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 10_000
    bare = outcome.output.count("ratio of a token") == 0
    assert bare == (name in ("empty", "nothing"))


def test_the_picture_says_what_it_cannot_show(recorded, tmp_path):
    """Of an objective with a form there are no clips by token."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    one = tokenrl.load_batch(recorded["long"])
    row = numbers.inspected(type(one)(one.tensors, tokenrl.objective("fiberpo"), one.settings, one.source))
    picture.draw(row, tmp_path / "picture.svg")
    assert "known of the whole batch alone" in re.sub(r"<[^>]*>", "", (tmp_path / "picture.svg").read_text())


def test_numbers_that_are_none_are_counted(tmp_path):
    logp = torch.zeros(2, 3)
    logp[0, 1], logp[1, 2] = torch.nan, -torch.inf
    with tokenrl.record(tmp_path / "batch"):
        tokenrl.policy_loss("grpo", torch.where(logp == 0, -1.0, logp), torch.zeros(2, 3), torch.ones(2))
    outcome = called(tmp_path / "batch")
    assert outcome.exit_code == 0 and "logp: 2 valid tokens are NaN or infinite" in outcome.output
    assert json.loads(called(tmp_path / "batch", "--json").stdout)["not_finite"] == {"logp": 2}


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data[:100], r"path: got .*damaged"),
        (lambda data: b"", r"path: got .*damaged"),
        (lambda data: data.replace(b"tokenrl.rollout_batch", b"tokenrl.rollout_bitch"), "path: got .*of format"),
    ],
)
def test_a_damaged_batch_is_named(recorded, damage, message, tmp_path):
    (tmp_path / "damaged").write_bytes(damage(recorded["logits"].read_bytes()))
    outcome = called(tmp_path / "damaged")
    assert outcome.exit_code == 1 and re.match(f"tokenrl inspect: {message}", outcome.output), outcome.output


def test_a_batch_without_its_mask_shape_is_named(recorded, tmp_path):
    tensors = load_file(recorded["long"])
    save_file(
        tensors | {"mask": tensors["mask"][:, 1:].contiguous()}, tmp_path / "batch", metadata_of(recorded["long"])
    )
    outcome = called(tmp_path / "batch")
    assert outcome.exit_code == 1 and "tokenrl inspect: mask: got shape [4, 4095]" in outcome.output


def metadata_of(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("nowhere",), "nowhere"),
        (("--out", "picture.pgn"), "out: got '.pgn', accepted: .png, .svg, .pdf. Did you mean '.png'?"),
        (("--backend", "cuda"), "backend: got 'cuda', which cannot run here ("),
        (("--backend", "cuba"), "backend: got 'cuba', accepted: cuda, cpu, triton, reference"),
    ],
)
def test_errors_name_what_is_accepted(recorded, arguments, message):
    outcome = called(*([] if "nowhere" in arguments else [recorded["logits"]]), *arguments)
    assert outcome.exit_code == 1 and outcome.output.startswith("tokenrl inspect: ") and message in outcome.output

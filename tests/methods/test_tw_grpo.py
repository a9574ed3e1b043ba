"""TW-GRPO's weights against their authors' code down to loss and gradients, against loops, and their edges."""

import math

import pytest
import torch
from cases import backends_to_test, device_of, thinned
from golden_data import INDEX, arrays, near

import tokenrl
from tokenrl import divergence_weights as dw
from tokenrl.methods.tw_grpo import linear_tw_grpo_weights, tw_grpo_weights

CASES = [f"tw.{i}" for i in range(5)]
SAME = "tw.4"  # a group of equal rows: the authors' rounding noise over 1e-8


def golden(case):
    x, config = arrays("tw_grpo", case), INDEX["tw_grpo"]["cases"][case]["config"]
    return x, config, torch.arange(len(x["mask"])) // config["num_generations"]


def close(found, x, name, case):
    if case == SAME:
        torch.testing.assert_close(found.detach().cpu(), x[name], rtol=1e-9, atol=1e-6)
    else:
        near(found, x[name], name)


def losses(x, config, logp, weights, device, backend):
    """The loss, with the KL term under the same weights."""
    how = {"mask": x["mask"].to(device), "token_weight": weights, "aggregation": "token-mean", "backend": backend}
    loss, _ = tokenrl.policy_loss("grpo", logp, None, x["advantages_out"].to(device), **how)
    if config["beta"] > 0:
        row = tokenrl.objective("kl_k3", clamp=11.0)
        kl, _ = tokenrl.policy_loss(row, logp, x["ref_logp"].to(device), None, **how)
        loss = loss + config["beta"] * kl
    return loss


@pytest.mark.parametrize("backend, case", [(b, case) for b in backends_to_test() for case in thinned(CASES, b)])
def test_golden(case, backend):
    x, config, group_ids = golden(case)
    device = device_of(backend)
    logits = x["logits"].to(device).requires_grad_()
    given = {"mask": x["mask"].to(device), "alpha": config["alpha"]}
    weights = tw_grpo_weights(logits, group_ids.to(device), **given)
    assert not weights.requires_grad
    close(weights, x, "weights", case)
    advantages = tokenrl.advantages.grpo(x["rewards"], group_ids, eps=1e-4)
    near(advantages, x["advantages_out"], "advantages")
    logp = tokenrl.token_logprobs(logits, x["token_ids"].long().to(device), outputs=("logp",), backend=backend).logp
    loss = losses(x, config, logp, weights, device, backend)
    close(loss, x, "loss", case)
    close(torch.autograd.grad(loss, logits, retain_graph=True)[0], x, "grad_logits_detached", case)

    attached = tw_grpo_weights(logits, group_ids.to(device), detach_weights=False, **given)
    close(attached, x, "weights", case)
    per_token = -x["advantages_out"].to(device)[:, None].expand_as(attached)
    if config["beta"] > 0:
        d = (x["ref_logp"].to(device) - logp.detach()).clamp(-11, 11)
        per_token = per_token + config["beta"] * (d.expm1() - d)
    close((per_token * weights), x, "token_loss", case)
    through = (attached * torch.where(given["mask"], per_token, 0.0)).sum() / given["mask"].sum()
    grad = torch.autograd.grad(loss + through - through.detach(), logits)[0]
    close(grad, x, "grad_logits", case)
    if case != SAME:
        assert not torch.allclose(x["grad_logits"], x["grad_logits_detached"], rtol=1e-3)


IDS = torch.tensor([3, 1, 3, 9, 1, 3, 1])  # not adjacent, one row alone


def batch(seed=0, width=6, vocab=9, dtype=torch.float64):
    """Holes, a row without tokens, a row of one token, columns where a group or every row has ended; NaN elsewhere."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(IDS), width, vocab, generator=g, dtype=torch.float64) * 2
    logits[0, 1, 0] = -40.0
    mask = torch.rand(len(IDS), width, generator=g) < 0.75
    mask[1], mask[2], mask[:, -1] = False, torch.arange(width) == 2, False
    mask[IDS == 3, -2] = False
    mask[3], mask[0, 1] = torch.arange(width) < 4, True
    return torch.where(mask[..., None], logits, math.nan).to(dtype), mask


def by_hand(logits, mask, alpha, positions, width=None):
    """[B, T]; one loop each for groups, positions, rows and columns."""
    rows, width, vocab = len(mask), width or mask.shape[1], logits.shape[-1]
    logs, out = logits.log_softmax(-1), torch.zeros(mask.shape, dtype=torch.float64)
    for group in set(IDS.tolist()):
        own, d = [i for i in range(rows) if IDS[i] == group], {}
        for t in range(width):
            there = [i for i in own if t < mask.shape[1] and mask[i, t]]
            if positions == "valid" and not there:
                continue
            total = 0.0
            for v in range(vocab):
                at = [float(logs[i, t, v]) if i in there else -math.log(vocab) for i in own]
                mean = sum(at) / len(at)
                x = [min(max(mean - value, -11.0), 11.0) for value in at]
                total += sum(math.exp(value) - value - 1 for value in x) / len(at)
            d[t] = total
        for i in own:
            for t in mask[i].nonzero()[:, 0].tolist():
                low, high = min(d.values()), max(d.values())
                out[i, t] = 1 + (alpha - 1) * (d[t] - low) / (high - low + 1e-8)
    return out


@pytest.mark.parametrize("positions", dw.POSITIONS)
def test_it_is_its_formula(positions):
    for seed, alpha in ((0, 1.7), (1, 1.4), (2, 0.5)):
        logits, mask = batch(seed)
        expected = by_hand(logits, mask, alpha, positions)
        for detach in (True, False):
            found = tw_grpo_weights(
                logits, IDS, mask=mask, alpha=alpha, positions=positions, detach_weights=detach
            )  # fmt: skip
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            assert (found[3, :4] == 1).all(), "nobody to disagree with"
            assert not found[~mask].any()
    assert (expected[mask] != 1).any()


def packed(x, ends):
    return torch.cat([row[:n] for row, n in zip(x, ends, strict=True)])


def same(found, expected):
    """To rounding: softmax and sums are torch's, which promises no bits of them."""
    near(found, expected, "weights", 1e-12)


def test_positions_and_width():
    logits, mask = batch()
    found = {p: tw_grpo_weights(logits, IDS, mask=mask, positions=p) for p in dw.POSITIONS}
    assert not torch.allclose(found["all"], found["valid"]), "every group has ended in the last column"
    wider = torch.cat([logits, logits[:, :2]], 1), torch.cat([mask, mask[:, :2] & False], 1)
    same(tw_grpo_weights(wider[0], IDS, mask=wider[1])[:, :-2], found["all"])
    # Without its last column nothing says that group 1 ended, until width does.
    cut = logits[:, :-1], mask[:, :-1]
    same(tw_grpo_weights(cut[0], IDS, mask=cut[1], width=6), found["all"][:, :-1])
    assert not torch.allclose(tw_grpo_weights(cut[0], IDS, mask=cut[1]), found["all"][:, :-1])
    same(tw_grpo_weights(cut[0], IDS, mask=cut[1], positions="valid"), found["valid"][:, :-1])
    torch.testing.assert_close(
        tw_grpo_weights(logits, IDS, mask=mask, width=99), by_hand(logits, mask, 1.7, "all", 9), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("positions", dw.POSITIONS)
def test_packed_equals_padded_and_groups_come_in_parts(positions):
    logits, mask = batch()
    ends = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in mask]
    cu = torch.tensor([0, *ends]).cumsum(0)
    width = {"width": 6} if positions == "all" else {}
    whole = tw_grpo_weights(logits, IDS, mask=mask, positions=positions)
    flat = tw_grpo_weights(
        packed(logits, ends), IDS, mask=packed(mask, ends), cu_seqlens=cu, positions=positions, **width
    )  # fmt: skip
    same(flat, packed(whole, ends))
    for own in (IDS == 1, IDS != 1):
        part = tw_grpo_weights(logits[own], IDS[own], mask=mask[own], positions=positions, **width)
        same(part, whole[own])


def test_tiles_and_views(monkeypatch):
    logits, mask = batch()
    whole = tw_grpo_weights(logits, IDS, mask=mask)
    wide = torch.full((len(IDS), 9, 9), math.nan, dtype=torch.float64)
    wide[:, 1:7] = logits
    same(tw_grpo_weights(wide[:, 1:7], IDS, mask=mask), whole)
    for view in (wide.transpose(0, 1).contiguous().transpose(0, 1), wide.transpose(1, 2).contiguous().transpose(1, 2)):
        same(tw_grpo_weights(view[:, 1:7], IDS, mask=mask), whole)
    steady = logits[:, 1:2].nan_to_num(1.0).expand(-1, 6, -1)
    repeated = tw_grpo_weights(steady, IDS, mask=mask)
    same(repeated, tw_grpo_weights(steady.contiguous(), IDS, mask=mask))
    assert (repeated[mask] != 1).any()
    tiles, formula = [], dw._tile

    def counted(z, *rest):
        tiles.append(z.shape)
        return formula(z, *rest)

    monkeypatch.setattr(dw, "_tile", counted)
    monkeypatch.setattr(dw, "COLUMNS", 2)
    near(tw_grpo_weights(logits, IDS, mask=mask, memory_budget=700), whole, "tiles")
    assert len(tiles) > 20 and all(z[0] * z[1] * dw.TEMPORARIES * 8 <= 700 for z in tiles)


def head(vocab=33, width=6, d=7):
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(len(IDS), width, d, generator=g, dtype=torch.float64)
    weight, bias = torch.randn(vocab, d, generator=g).double(), torch.randn(vocab, generator=g).double()
    mask = batch()[1]
    return torch.where(mask[..., None], hidden, math.nan), weight, bias, mask


def test_from_hidden_states():
    hidden, weight, bias, mask = head()
    for options, logits in (
        ({}, hidden @ weight.t()),
        ({"bias": bias, "temperature": 0.7}, (hidden @ weight.t() + bias) / 0.7),
    ):
        for more in ({}, {"positions": "valid", "alpha": 1.2}, {"width": 8}):
            expected = tw_grpo_weights(logits, IDS, mask=mask, **more)
            for budget in (None, 1 << 14):
                found = linear_tw_grpo_weights(
                    hidden.clone().requires_grad_(), torch.nn.Parameter(weight), IDS, mask=mask, memory_budget=budget,
                    **options, **more,
                )  # fmt: skip
                near(found, expected, "weights")
                assert not found.requires_grad
    cu = torch.arange(len(IDS) + 1) * mask.shape[1]
    flat = linear_tw_grpo_weights(hidden.flatten(0, 1), weight, IDS, mask=mask.flatten(), cu_seqlens=cu)
    near(flat.view(mask.shape), tw_grpo_weights(hidden @ weight.t(), IDS, mask=mask), "packed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    logits, mask = batch(vocab=300, dtype=dtype)
    found = tw_grpo_weights(logits, IDS, mask=mask)
    assert found.dtype == torch.float32
    expected = tw_grpo_weights(logits.double(), IDS, mask=mask)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    hidden, weight, _, mask = head()
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    found = linear_tw_grpo_weights(hidden, weight, IDS, mask=mask, compute_dtype=torch.float32)
    expected = linear_tw_grpo_weights(hidden.double(), weight.double(), IDS, mask=mask)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_column_without_probability_shows():
    logits, mask = batch()
    logits[4, mask[4].nonzero()[0], 2] = -math.inf
    found = tw_grpo_weights(logits, IDS, mask=mask)
    assert torch.equal(found.isnan(), mask & (IDS == 1)[:, None])


def test_equal_rows_weigh_one_in_every_dtype():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits = (torch.randn(1, 4, 500, generator=torch.Generator().manual_seed(0)) * 5).to(dtype).expand(3, 4, 500)
        found = tw_grpo_weights(logits.contiguous(), torch.zeros(3, dtype=torch.int64))
        assert torch.equal(found, torch.ones_like(found))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 4)])
def test_batches_without_a_valid_token(shape):
    logits, mask, ids = torch.full((*shape, 5), math.nan), torch.zeros(shape).bool(), torch.arange(shape[0])
    for detach in (True, False):
        found = tw_grpo_weights(logits, ids, mask=mask, detach_weights=detach)
        assert found.shape == shape and not found.any()
    assert not linear_tw_grpo_weights(logits, torch.ones(9, 5), ids, mask=mask).any()


LOGITS, GROUP = torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"positions": "valids"}, "positions: .*Did you mean 'valid'"),
        ({"width": 2}, "width: got 2, accepted: at least the longest row of this call, 3"),
        ({"width": 4, "positions": "valid"}, "width: got 4, accepted: None"),
        ({"alpha": math.nan}, "alpha: got nan"),
        ({"logits": LOGITS[0]}, r"logits: got shape \[3, 4\]"),
        ({"logits": LOGITS.long()}, "logits: got dtype torch.int64"),
        ({"cu_seqlens": torch.tensor([0, 3])}, r"logits: got shape .*\[N, V\] with cu_seqlens"),
        ({"group_ids": GROUP[:1]}, r"group_ids: got \[1\]"),
        ({"group_ids": None}, "group_ids: got None"),
        ({"group_ids": GROUP.float()}, "group_ids: got dtype"),
        ({"mask": torch.ones(2, 3)}, "mask: got dtype torch.float32"),
        ({"memory_budget": 1}, "memory_budget: got 1 bytes, accepted: more"),
        ({"memory_budget": 0.5}, "memory_budget: got 0.5"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        tw_grpo_weights(**{"logits": LOGITS, "group_ids": GROUP, **options})

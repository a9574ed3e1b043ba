"""tokenrl.compat.liger's GRPO beside the real Liger-Kernel: its chunked loss in torch, its kernels interpreted."""

import itertools
import math
import warnings

import pytest
import torch

pytest.importorskip(
    "liger_kernel", reason="liger-kernel is not installed (make test installs it, without dependencies)"
)

from liger_kernel import chunked_loss
from liger_kernel.transformers import grpo_loss

from tokenrl.compat import liger

B, T, V, D = 4, 6, 23, 8
TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo")


def batch():
    """Ratios beyond every bound, a sequence without a token, one with a hole, one of A = 0."""
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(T) < torch.tensor([[6], [0], [4], [6]])
    mask[3, 2] = False
    hidden, weight, bias = (torch.randn(*shape, generator=g) for shape in ((B, T + 1, D), (V, D), (V,)))
    ids = torch.randint(V, (B, T), generator=g)
    logp = (hidden[:, :-1] @ weight.T + bias).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old, ref = (logp + 0.6 * torch.randn(B, T, generator=g) for _ in range(2))
    ratio = torch.where(mask, 0.3 * torch.randn(B, T, generator=g), 0).exp()  # Liger's vespo reads masked ones too
    return {
        "hidden": hidden, "weight": weight, "bias": bias, "ids": ids, "old": old, "ref": ref, "ratio": ratio,
        "advantages": torch.tensor([1.3, 0.7, -0.9, 0.0]), "mask": mask.float(),
    }  # fmt: skip


def near(found, expected, rel=2e-5):
    for x, y in zip(found, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.shape == y.shape
            assert (x - y).abs().max() <= rel * max(y.abs().max(), 0.1), (x, y)  # fp32 sums of terms near 1


def from_logits(module, x, seed=1, old=True, **options):
    """The results, then the gradient of the first: of a sum under random weights where it is not reduced."""
    leaf = (x["hidden"] @ x["weight"].T + x["bias"]).requires_grad_()
    ref = x["ref"] if options.get("beta", 0.04) else None
    out = module.triton_grpo_loss(
        leaf * 1, x["old"] if old else None, ref, x["ids"], x["advantages"], x["mask"], **options
    )
    first = out[0]
    if first.dim():
        first = (first * torch.randn(first.shape, generator=torch.Generator().manual_seed(seed))).sum()
    (grad,) = torch.autograd.grad(first, leaf)
    metrics = out[1] if options.get("reduce") else out[1:]
    return [None if y is None else y.detach() for y in (out[0], *metrics, grad)]


OPTIONS = {
    "defaults": {},
    "no KL": {"beta": 0.0, "temperature": 1.0},
    "on-policy": {"old": False},
    "delta": {"delta": 1.1, "eps_low": 0.1},
    "a wide delta": {"delta": 1.8, "beta": 0.0},
    "token ratios": {"vllm_is_ratio": "ratio"},
    "a ratio a sequence": {"vllm_is_ratio": "flat", "beta": 0.1},
    "sequence ratios": {"vllm_is_ratio": "column", "beta": 0.1},
    "corrected KL": {"beta": 0.3, "use_bias_correction_kl": True},
    "corrected KL, ratios": {"beta": 0.3, "use_bias_correction_kl": True, "vllm_is_ratio": "ratio"},
    "items": {"num_items_in_batch": 29, "max_completion_length": 9},
    "parameters": {
        "eps_low": 0.05, "eps_high": 0.9, "sapo_temperature_pos": 0.5, "sapo_temperature_neg": 2.0, "vespo_k_pos": 1.5,
        "vespo_lambda_neg": 1.0,
    },
}  # fmt: skip


def options_of(name, x):
    given = dict(OPTIONS[name])
    if "vllm_is_ratio" in given:
        of = {"ratio": x["ratio"], "column": x["ratio"][:, :1], "flat": x["ratio"][:, 0]}
        given["vllm_is_ratio"] = of[given["vllm_is_ratio"]]
    return given


def refused(name, loss_type, level):
    return loss_type not in CLIPPED and ("delta" in name or level == "sequence")


REFUSED = "^(delta|importance_sampling_level|use_bias_correction_kl): got "
UNREDUCED_ALONE = ("corrected KL, ratios", "vespo")


PER_TOKEN = [(loss_type, False) for loss_type in ("grpo", "cispo", "sapo", "vespo")]  # the others are grpo's there
KINDS = [*PER_TOKEN, *((loss_type, True) for loss_type in TYPES)]
# Each pair of option, kind and level; of the options that meet the level in a formula of their own, all three.
CASES = [
    (name, *kind, level)
    for (i, name), (k, kind), (n, level) in itertools.product(*map(enumerate, (OPTIONS, KINDS, ("token", "sequence"))))
    if (i + k + n) % 2 == 0 or "corrected" in name or "ratio" in name
]


@pytest.mark.parametrize(("name", "loss_type", "reduce", "level"), CASES)
def test_triton_grpo_loss(name, loss_type, reduce, level):
    x = batch()
    how = {"loss_type": loss_type, "importance_sampling_level": level, "reduce": reduce, **options_of(name, x)}
    if refused(name, loss_type, level) or (reduce and (name, loss_type) == UNREDUCED_ALONE):
        with pytest.raises(ValueError, match=REFUSED):
            from_logits(liger, x, **how)
        return
    near(from_logits(liger, x, **how), from_logits(grpo_loss, x, **how))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_luspo(level):
    """Reduced it is the mean over B L of losses times lengths; of single tokens Liger's backward of that reads beyond
    its memory, so there the gradient is that of Liger's unreduced losses."""
    x, how = batch(), {"loss_type": "luspo", "importance_sampling_level": level}
    reduced, leaf = {}, (x["hidden"] @ x["weight"].T + x["bias"]).requires_grad_()
    for module in (grpo_loss, liger):
        near(from_logits(liger, x, **how), from_logits(module, x, **how))
        given = (x["old"], x["ref"], x["ids"], x["advantages"], x["mask"])
        reduced[module] = module.triton_grpo_loss(leaf * 1, *given, reduce=True, **how)
    near([reduced[liger][0], *reduced[liger][1]], [reduced[grpo_loss][0], *reduced[grpo_loss][1]])
    losses = grpo_loss.triton_grpo_loss(leaf * 1, *given, **how)[0]
    truth = torch.autograd.grad((losses * x["mask"].sum(1, keepdim=True)).mean(), leaf)
    near(torch.autograd.grad(reduced[liger][0], leaf), truth)
    if level == "sequence":
        near(torch.autograd.grad(reduced[grpo_loss][0], leaf), truth)


def test_unmasked_and_of_16_bits():
    x = {**batch(), "mask": None}
    near(from_logits(liger, x, reduce=True), from_logits(grpo_loss, x, reduce=True))
    leaf = (x["hidden"] @ x["weight"].T).bfloat16()
    given = (x["old"].bfloat16(), x["ref"], x["ids"], x["advantages"], None)
    found, theirs = (module.triton_grpo_loss(leaf * 1, *given, reduce=True)[0] for module in (liger, grpo_loss))
    assert found.dtype == theirs.dtype == torch.float32
    near([found], [theirs])


def test_masked_cells_may_hold_anything():
    x = batch()
    expected = from_logits(liger, x)
    dirty = {name: y.clone() for name, y in x.items()}
    left_out = x["mask"] == 0
    dirty["hidden"][:, :-1][left_out] = math.nan
    dirty["ids"][left_out] = 10**6
    for name in ("old", "ref", "ratio"):
        dirty[name][left_out] = math.nan
    found = from_logits(liger, dirty)
    keep = torch.nn.functional.pad(x["mask"] != 0, (0, 1))
    near([*found[:3], found[3][keep]], [*expected[:3], expected[3][keep]])
    assert not found[3][~keep].any()


def test_the_gradient_lies_in_the_logits_where_it_may():
    x = batch()
    leaf = (x["hidden"] @ x["weight"].T).requires_grad_()
    for inplace in (True, False):
        logits = leaf * 1
        before = logits.detach().clone()
        given = (x["old"], x["ref"], x["ids"], x["advantages"], x["mask"])
        liger.triton_grpo_loss(logits, *given, inplace=inplace, reduce=True)[0].backward()
        assert torch.equal(logits, before) != inplace
        assert not leaf.grad[:, -1].any()


@pytest.mark.parametrize("mask", [None, "ids"])
def test_fused_selective_log_softmax(mask):
    x = batch()
    logits = (x["hidden"] @ x["weight"].T).requires_grad_()
    ids = torch.cat([x["ids"], x["ids"]], 1)  # a prompt before the completion
    given = None if mask is None else torch.cat([torch.ones(B, T), x["mask"]], 1)
    found, expected = (m.fused_selective_log_softmax(logits, ids, 0.7, given) for m in (liger, grpo_loss))
    assert not found.requires_grad
    near([found], [expected])


HEAD = {
    **{
        name: OPTIONS[name]
        for name in OPTIONS
        if name not in ("no KL", "on-policy", "parameters", "a ratio a sequence")
    },
    "no KL": {"beta": 0.0},
    "on-policy": {"old": None},
    "no reference": {"use_ref_model": False, "beta": 0.2, "use_bias_correction_kl": True},
    "the reference's hidden states": {"ref": "hidden", "temperature": 0.7},
    "parameters": OPTIONS["parameters"],
    "no bias": {"bias": None, "temperature": 0.7},
}
AT_CALL = ("old", "ref", "bias", "vllm_is_ratio", "num_items_in_batch")
THEIR_NAMES = {"eps_low": "epsilon_low", "eps_high": "epsilon_high"}


def from_hidden(module, x, name, **how):
    """(loss, metrics, gradients of hidden states, weight and bias)"""
    options = {**HEAD[name], **how}
    call = {key: options.pop(key) for key in AT_CALL if key in options}
    options = {THEIR_NAMES.get(key, key): value for key, value in options.items()}
    hidden, weight, bias = (x[key].clone().requires_grad_() for key in ("hidden", "weight", "bias"))
    ref = {"ref_per_token_logps": x["ref"]}
    if call.get("ref") == "hidden":
        noise = 0.3 * torch.randn(B, T, D, generator=torch.Generator().manual_seed(2))
        ref = {"ref_input": x["hidden"][:, :-1] + noise, "ref_weight": 0.9 * x["weight"], "ref_bias": x["bias"]}
    ratio = {"vllm_is_ratio": options_of(name, x)["vllm_is_ratio"]} if "vllm_is_ratio" in call else {}
    loss, metrics = module.LigerFusedLinearGRPOLoss(compiled=False, **options)(
        hidden[:, :-1], weight, x["ids"], x["mask"], x["advantages"], bias=None if "bias" in call else bias,
        old_per_token_logps=None if "old" in call else x["old"], num_items_in_batch=call.get("num_items_in_batch"),
        **ref, **ratio,
    )  # fmt: skip
    leaves = [hidden, weight] + ([] if "bias" in call else [bias])
    return [loss.detach(), *(m.detach() for m in metrics), *torch.autograd.grad(1.7 * loss, leaves)]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", TYPES)
@pytest.mark.parametrize("name", HEAD)
def test_fused_linear_grpo_loss(name, loss_type, level):
    x, how = batch(), {"loss_type": loss_type, "importance_sampling_level": level, "max_completion_length": 9}
    if refused(name, loss_type, level) or (name, loss_type) == UNREDUCED_ALONE:
        with pytest.raises(ValueError, match=REFUSED):
            from_hidden(liger, x, name, **how)
        return
    near(from_hidden(liger, x, name, **how), from_hidden(chunked_loss, x, name, **how))


def test_autocast_is_followed():
    """In bf16 as Liger's: no further from fp32 than its own head, but for a rounding."""
    x = batch()
    truth = from_hidden(liger, x, "no bias")
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        found, theirs = (from_hidden(module, x, "no bias") for module in (liger, chunked_loss))
    ours, own = (
        [(y - t).norm() / t.norm().clamp(min=0.1) for y, t in zip(z, truth, strict=True)] for z in (found, theirs)
    )
    assert 1e-4 < ours[0] and all(a <= 1.5 * b + 8e-3 for a, b in zip(ours, own, strict=True)), (ours, own)


def test_processes_share_the_count(monkeypatch):
    """Liger's own two lines and ours under the same stand-in for two processes with as many tokens."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, op=None: x.mul_(3))
    x = batch()
    for items in (None, 41, torch.tensor(41)):
        how = {"loss_type": "dapo", "num_items_in_batch": items}
        found = from_hidden(liger, x, "no KL", **how)
        near(found, from_hidden(chunked_loss, x, "no KL", **how))


ERRORS = [
    ({"loss_type": "grpo2"}, "loss_type: got 'grpo2'.*Did you mean 'grpo'"),
    ({"importance_sampling_level": "seq"}, "importance_sampling_level: got 'seq'"),
    ({"delta": -1.0}, "delta: got -1.0"),
    ({"sapo_temperature_pos": 0}, "sapo_temperature_pos: got 0"),
    ({"temperature": 0.0}, "temperature: got 0.0"),
    ({"beta": None}, "beta: got None"),
]


@pytest.mark.parametrize(("options", "said"), ERRORS, ids=str)
def test_options_that_neither_has(options, said):
    x = batch()
    with pytest.raises(ValueError, match=f"^{said}"):
        from_logits(liger, x, **options)
    with pytest.raises(ValueError, match=f"^{said}"):
        from_hidden(liger, x, "defaults", **options)


def test_arguments():
    x = batch()
    for name, value, said in (
        ("ids", x["ids"][:, :-1], "completion_ids: got shape"),
        ("advantages", x["ref"], "advantages: got shape"),
        ("mask", x["mask"][:2], "completion_mask: got shape"),
        ("mask", 0.5 * x["mask"], "completion_mask: got values between, accepted: 0 and 1"),
        ("ref", None, "ref_logp: got None"),
    ):
        with pytest.raises(ValueError, match=f"^{said}"):
            from_logits(liger, {**x, name: value})
    with pytest.raises(ValueError, match="^vllm_is_ratio: got shape"):
        from_logits(liger, x, vllm_is_ratio=x["ratio"][:2])
    for options, said in (({"loss_type": "luspo"}, "loss_type: got 'luspo'"), ({"loss_type": "dr_grpo"}, "max_comp")):
        with pytest.raises(ValueError, match=f"^{said}"):
            liger.LigerFusedLinearGRPOLoss(**options)
    with pytest.raises(ValueError, match="^ref_per_token_logps: got None"):
        from_hidden(liger, {**x, "ref": None}, "defaults")
    with pytest.raises(ValueError, match="^old_per_token_logps: got None"):
        from_hidden(liger, x, "token ratios", loss_type="vespo", old=None)

"""tokenrl.record and tokenrl.load_batch: what comes back is what the loss was called with; damaged files are named."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tokenrl

G = torch.Generator().manual_seed(0)
B, T, D, V = 4, 9, 6, 23
HIDDEN, WEIGHT, BIAS = (torch.randn(*shape, generator=G) for shape in ((B, T, D), (V, D), (V,)))
IDS = torch.randint(0, V, (B, T), generator=G)
MASK = torch.rand(B, T, generator=G) > 0.3
OLD, REF = (torch.randn(B, T, generator=G) / 3 - 3 for _ in range(2))
ADVANTAGES, GROUPS = torch.tensor([1.0, -1.0, 0.5, -0.5]), torch.tensor([0, 0, 7, 7])
MORE = {"mask": MASK, "ref_logp": REF, "kl_coef": 0.1, "kl_ratio": "token", "normalizer": torch.tensor(40.0)}
CU = torch.tensor([0, 9, 14, 14, 36])


def packed(x):
    return x.reshape(B * T, *x.shape[2:]) if x.dim() > 1 and x.shape[:2] == (B, T) else x


def from_logits(rows=slice(None), **more):
    """A trainer's step that scores prompt and answer, and trains on a view of the log-probs."""
    logits = (HIDDEN @ WEIGHT.t()).requires_grad_()
    logp = tokenrl.token_logprobs(logits, IDS, temperature=0.7, backend="reference").logp[rows]
    old, mask = OLD[rows], MASK[rows]
    loss, _ = tokenrl.policy_loss("ctpo", logp, old, ADVANTAGES[: len(logp)], mask=mask, **more)
    return loss, torch.autograd.grad(loss, logits)[0][rows]


def from_hidden(layout="padded", row="grpo", **more):
    given = [HIDDEN, WEIGHT.clone().requires_grad_(), IDS, OLD, ADVANTAGES]
    more = MORE | {"bias": BIAS, "softcap": 30.0, "temperature": torch.full((B, T), 0.9)} | more
    if layout == "packed":
        given[0], given[2], given[3] = map(packed, (HIDDEN, IDS, OLD))
        more = {name: packed(x) if isinstance(x, torch.Tensor) else x for name, x in more.items()} | {"cu_seqlens": CU}
    loss, _ = tokenrl.linear_policy_loss(row, *given, **more)
    return loss, torch.autograd.grad(loss, given[1])[0]


def again(batch, leaf, **how):
    """The loss of a recorded batch, and its gradient by a tensor of it."""
    x = batch.tensors[leaf].clone().requires_grad_()
    loss, _ = dataclasses.replace(batch, tensors={**batch.tensors, leaf: x}).loss(**how)
    return loss, torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    "row", ["grpo", tokenrl.objective("ctpo", eps_low=0.03, power=0.4), tokenrl.objective("ppo", eps_high=REF.exp())]
)
def test_a_call_comes_back_from_hidden_states(row, layout, tmp_path):
    if layout == "packed" and isinstance(row, tokenrl.Objective) and row.name == "ppo":
        row = tokenrl.objective("ppo", eps_high=packed(REF.exp()))
    with tokenrl.record(tmp_path / "batch", source={"host": "a test"}) as recording:
        loss, gradient = from_hidden(layout, row)
    batch = tokenrl.load_batch(tmp_path / "batch")
    found, of_weight = again(batch, "weight")
    torch.testing.assert_close(found, loss.detach(), rtol=1e-6, atol=1e-7)
    assert gradient.any()
    torch.testing.assert_close(of_weight, gradient, rtol=1e-5, atol=1e-7)
    assert batch.source["host"] == "a test" and batch.source["function"] == "linear_policy_loss"
    assert recording.left_out == 0 and batch.leaf == "hidden"


def test_the_entropy_is_the_heads(tmp_path):
    """Its gradient comes back, where the loss made it and where it was given one of the same call; a constant stays."""
    with tokenrl.record(tmp_path / "hidden"):
        loss, gradient = from_hidden(entropy_coef=0.1)
    batch = tokenrl.load_batch(tmp_path / "hidden")
    for backend in ("cpu", "reference"):
        found, of_weight = again(batch, "weight", backend=backend)
        torch.testing.assert_close(found, loss.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(of_weight, gradient, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(gradient, from_hidden()[1], rtol=1e-2)
    logits = (HIDDEN @ WEIGHT.t()).requires_grad_()
    for constant in (False, True):
        with tokenrl.record(tmp_path / "logits"):
            logp, entropy = tokenrl.token_logprobs(logits, IDS, temperature=0.7, backend="reference")
            entropy = entropy.detach() if constant else entropy
            given = {"mask": MASK[1:], "entropy": entropy[1:], "entropy_coef": 0.1}
            loss, _ = tokenrl.policy_loss("grpo", logp[1:], OLD[1:], ADVANTAGES[1:], **given)
        batch = tokenrl.load_batch(tmp_path / "logits")
        found, of_logits = again(batch, "logits")
        torch.testing.assert_close(found, loss.detach())
        torch.testing.assert_close(of_logits, torch.autograd.grad(loss, logits)[0][1:])
        assert ("entropy" in batch.tensors) == constant


def test_ignored_ids_take_their_tokens_out(tmp_path):
    ids = IDS.masked_fill(torch.arange(T) == 2, -1)
    weight = WEIGHT.clone().requires_grad_()
    with tokenrl.record(tmp_path / "batch"):
        loss, _ = tokenrl.linear_policy_loss("ctpo", HIDDEN, weight, ids, OLD, ADVANTAGES, ignore_index=-1)
    found, gradient = again(tokenrl.load_batch(tmp_path / "batch"), "weight")
    torch.testing.assert_close(found, loss.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, weight)[0])


@pytest.mark.parametrize("rows", [slice(None), (slice(1, 3), slice(2, None))], ids=["all", "a view"])
def test_logits_come_along_with_their_log_probs(rows, tmp_path):
    with tokenrl.record(tmp_path / "batch"):
        loss, gradient = from_logits(rows)
    batch = tokenrl.load_batch(tmp_path / "batch")
    assert batch.leaf == "logits" and batch.tokens.shape == IDS[rows].shape
    found, of_logits = again(batch, "logits")
    torch.testing.assert_close(found, loss.detach())
    torch.testing.assert_close(of_logits, gradient)
    assert not batch.loss("grpo")[0] == found


def test_log_probs_of_elsewhere_come_alone(tmp_path):
    logp = (OLD + 0.1).requires_grad_()
    with tokenrl.record(tmp_path / "batch"):
        from_logits_of_others = tokenrl.token_logprobs(HIDDEN @ WEIGHT.t(), IDS)
        loss, _ = tokenrl.policy_loss("grpo", logp, None, ADVANTAGES[:, None], token_weight=MASK[:, :1].float())
    batch = tokenrl.load_batch(tmp_path / "batch")
    assert batch.leaf == "logp" and "logits" not in batch.tensors and "old_logp" not in batch.tensors
    assert from_logits_of_others is not None
    found, gradient = again(batch, "logp")
    assert found == loss and torch.equal(gradient, torch.autograd.grad(loss, logp)[0])


def test_the_limit_keeps_whole_sequences(tmp_path):
    row = tokenrl.objective("ppo", eps_high=packed(REF.exp()))
    with tokenrl.record(tmp_path / "all") as every:
        from_hidden("packed", row)
    size = sum(x.nbytes for x in every.batch.tensors.values()) + REF.nbytes
    with tokenrl.record(tmp_path / "some", limit=int(size * 0.6)) as recording:
        from_hidden("packed", row)
    batch = tokenrl.load_batch(tmp_path / "some")
    kept = batch.layout.num_sequences
    assert recording.left_out == B - kept == 1
    assert (
        batch.tensors["cu_seqlens"].tolist() == CU[:4].tolist() and sum(x.nbytes for x in batch.tensors.values()) < size
    )
    for name in ("ids", "hidden", "old_logp", "advantages", "weight"):
        assert torch.equal(batch.tensors[name], every.batch.tensors[name][: len(batch.tensors[name])])
    assert torch.equal(batch.objective.gate.eps_high, packed(REF.exp())[: CU[3]])
    assert batch.loss()[0].isfinite()
    with tokenrl.record(tmp_path / "none", limit=size) as whole:
        from_hidden("packed", row)
    with tokenrl.record(tmp_path / "none", limit=size - 1) as less:
        from_hidden("packed", row)
    assert whole.left_out == 0 and less.left_out == 1
    with (
        pytest.raises(
            ValueError, match=r"^limit: got 700 bytes, accepted: at least [0-9,]+: the head and one sequence"
        ),
        tokenrl.record(tmp_path / "none", limit=700),
    ):
        from_hidden()


def test_only_the_first_loss_is_recorded_and_none_is_an_error(tmp_path):
    with tokenrl.record(tmp_path / "batch"):
        from_hidden()
        from_logits()
    assert tokenrl.load_batch(tmp_path / "batch").objective.name == "grpo"
    with pytest.raises(RuntimeError, match="^record: saw no loss"), tokenrl.record(tmp_path / "none"):
        pass
    with pytest.raises(ValueError, match="^limit: got '2 apples', accepted: a number of bytes, or as '512 MB'"):
        tokenrl.record(tmp_path / "none", limit="2 apples").__enter__()
    logp = -torch.rand(2, 3)
    message = "^record: saw preference_loss alone, accepted: a call of policy_loss or linear_policy_loss inside"
    with pytest.raises(RuntimeError, match=message), tokenrl.record(tmp_path / "pairs"):
        tokenrl.preference_loss("dpo", logp, logp)


def test_what_is_recorded_is_what_was_there_at_the_call(tmp_path):
    logits = torch.randn(2, 3, 5, generator=G).requires_grad_()
    before = logits.detach().clone()
    with tokenrl.record(tmp_path / "batch"):
        ids = IDS[:2, :3].clamp(max=4)
        logp = tokenrl.token_logprobs(logits, ids).logp
        tokenrl.policy_loss("grpo", logp, None, ADVANTAGES[:2])[0].backward()
        with torch.no_grad():
            logits.add_(1)
            ids.zero_()
    batch = tokenrl.load_batch(tmp_path / "batch")
    assert torch.equal(batch.tensors["logits"], before) and batch.tensors["ids"].any()


def written(tmp_path, metadata=None, drop=(), **tensors):
    """A good file, changed."""
    with tokenrl.record(tmp_path / "batch"):
        from_hidden()
    good = load_file(tmp_path / "batch")
    with rollout_batch_file(tmp_path / "batch") as file:
        words = file.metadata()
    kept = {name: x for name, x in (good | tensors).items() if name not in drop}
    save_file(kept, tmp_path / "changed", words | (metadata or {}))
    return tmp_path / "changed"


def rollout_batch_file(path):
    from safetensors import safe_open

    return safe_open(path, framework="pt")


FAULTS = {
    "format": ({"metadata": {"format": "else"}}, r"path: got .*, of format 'else', accepted: 'tokenrl.rollout_batch'"),
    "version": ({"metadata": {"version": "2"}}, r"path: got .*, of version '2', accepted: 1 \(a newer tokenrl"),
    "words": ({"metadata": {"objective": "grpo"}}, "path: got .*, unread metadata"),
    "depth": ({"metadata": {"source": "[" * 100_000}}, "path: got .*, accepted: what tokenrl.record wrote"),
    "digits": (
        {"metadata": {"settings": f'{{"kl_coef": {"9" * 5000}}}'}},
        "path: got .*, accepted: what tokenrl.record wrote",
    ),
    "no object": ({"metadata": {"source": "3"}}, "path: got .*, accepted: what tokenrl.record wrote"),
    "objective": (
        {"metadata": {"objective": json.dumps({"name": "grp"})}},
        "objective: got 'grp', .* Did you mean 'grpo'",
    ),
    "setting": ({"metadata": {"settings": json.dumps({"temprature": 1})}}, "setting: .* Did you mean 'temperature'"),
    "head": ({"drop": ("hidden",)}, "batch: got .*, accepted: logits, hidden with weight, or logp"),
    "no weight": ({"drop": ("weight",)}, "weight: got None, accepted: the head's"),
    "no ids": ({"drop": ("ids",)}, "ids: got None, accepted: one id per row of hidden"),
    "dtype": ({"ids": IDS.float()}, "ids: got dtype torch.float32, accepted: int64"),
    "shape": ({"old_logp": OLD[:, 1:].contiguous()}, r"old_logp: got shape \[4, 8\], accepted: one value per token"),
    "width": ({"weight": WEIGHT[:, 1:].contiguous()}, r"weight: got shape \[23, 5\], accepted: \[V, 6\]"),
    "name": ({"old_logps": OLD.clone()}, "tensor: got 'old_logps', .* Did you mean 'old_logp'"),
    "mask": ({"mask": MASK[1:].contiguous()}, r"mask: got shape \[3, 9\], accepted: the shape of ids"),
    "parameter": (
        {
            "metadata": {"objective": json.dumps({"name": "ppo"})},
            "objective.eps_low": OLD[1:].exp(),
        },
        r"objective.eps_low: got shape \[3, 9\], accepted: one value per token, \[4, 9\]",
    ),
    "advantages": (
        {"advantages": ADVANTAGES[1:].contiguous()},
        r"advantages: got shape \[3\], accepted: one per sequence",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_wrong_is_named(fault, tmp_path):
    changes, message = FAULTS[fault]
    with pytest.raises(ValueError, match=f"^{message}"):
        tokenrl.load_batch(written(tmp_path, **changes))


class Touch:
    """What unpickling would do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_runs_nothing(tmp_path):
    torch.save({"logp": Touch(tmp_path / "ran")}, tmp_path / "batch")
    with pytest.raises(ValueError, match="^path: got .*, accepted: a file that tokenrl.record wrote"):
        tokenrl.load_batch(tmp_path / "batch")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "batch", weights_only=False)
    assert (tmp_path / "ran").exists()  # so it would have


@pytest.mark.parametrize("kept", [0, 5, 300, -8])
def test_a_truncated_file_is_named(kept, tmp_path, monkeypatch):
    path = written(tmp_path)
    monkeypatch.chdir(tmp_path)  # of a long path the message would leave out the middle
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"^path: got changed, damaged \(.*accepted: a file that tokenrl.record wrote"):
        tokenrl.load_batch(path.name)

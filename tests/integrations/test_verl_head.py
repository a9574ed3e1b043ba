"""fuse and patch: verl's real head and log-prob functions (tests/support/verl_source.py) beside tokenrl's."""

import os
import sys
from types import ModuleType

import pytest
import torch
import verl_source
from torch.nn import functional

if verl_source.folder() is None:
    pytest.skip("verl is not installed (make test installs it, without its dependencies)", allow_module_level=True)

from tokenrl import compat
from tokenrl.integrations import verl
from tokenrl.integrations.verl import head

FILES = {
    head.FUSED: "utils/experimental/torch_functional.py",
    head.KERNEL: "utils/kernel/linear_cross_entropy.py",
}
ABSENT = {"FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE": False, "NPU_CROSS_ENTROPY_LOSS_AVAILABLE": False}


@pytest.fixture
def modules(monkeypatch):
    """verl's modules of the head and of its functions as if they were imported, and one that imported from them."""
    made = {name: verl_source.lifted(name, file, lambda node: True) for name, file in FILES.items()}
    wanted = ("gather_from_labels", "logprobs_from_logits", "logprobs_from_logits_v2", *head.NAMES)
    known = {"os": os, "F": functional, **ABSENT}
    made[head.FUNCTIONS] = verl_source.lifted(
        head.FUNCTIONS, "utils/torch_functional.py", verl_source.named(*wanted), **known
    )
    other = ModuleType("verl.models.some")
    other.linear_cross_entropy = made[head.KERNEL].linear_cross_entropy
    other.logprobs_from_logits = made[head.FUNCTIONS].logprobs_from_logits
    for name, module in {**made, other.__name__: other}.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield {**made, "other": other}
    verl.unfuse(), verl.unpatch()


def inputs(dtype, rows=(2, 7), width=16, vocabulary=41):
    g = torch.Generator().manual_seed(3)
    hidden, weight = (
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((*rows, width), (vocabulary, width))
    )
    ids = torch.randint(vocabulary, rows, generator=g)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), ids.roll(-1, -1)


def run(call, dtype, autocast=False, **shape):
    """(log-probs, entropies, gradients of hidden and weight)"""
    hidden, weight, ids = inputs(dtype, **shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logp, entropy = call(hidden, weight, ids)
    g = torch.Generator().manual_seed(4)
    sum((x.double() * torch.randn(x.shape, generator=g, dtype=torch.float64)).sum() for x in (logp, entropy)).backward()
    return logp.detach(), entropy.detach(), hidden.grad, weight.grad


def errors(found, truth):
    return [((x.double() - y).abs().max() / y.abs().max()).item() for x, y in zip(found, truth, strict=True)]


@pytest.mark.parametrize("rows", [(14,), (2, 7)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["fp64", "fp32", "bf16", "autocast"])
def test_fused_linear_for_ppo(kind, temperature, rows, modules):
    """As near to an fp64 head of the rounded inputs as verl's, which computes fp64 in fp32 and rounds bf16 entropies;
    its backward under autocast is fp32, ours bf16 as that of any matmul there."""
    dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(kind, torch.float32)

    def real(hidden, weight, ids):
        return modules[head.FUSED].FusedLinearForPPO()(hidden, weight, ids, temperature)

    def exact(hidden, weight, ids):
        logp = ((hidden.double() @ weight.double().T) / temperature).log_softmax(-1)
        return logp.gather(-1, ids[..., None])[..., 0], -(logp.exp() * logp).sum(-1)

    how = {"autocast": kind == "autocast", "rows": rows}
    theirs, truth = run(real, dtype, **how), run(exact, dtype, rows=rows)
    verl.fuse()
    ours = run(real, dtype, **how)
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    assert ours[0].dtype == torch.promote_types(dtype, torch.float32)
    near, allowed = errors(ours, truth), errors(theirs, truth)
    print(kind, [f"{x:.0e}" for x in near], [f"{x:.0e}" for x in allowed])
    least = {"fp64": 1e-12, "autocast": 2e-2}.get(kind, 1e-6)
    assert all(x <= 1.5 * y + least for x, y in zip(near, allowed, strict=True))


def test_a_temperature_for_each_sample(modules):
    verl.fuse()
    temperature = torch.tensor([0.7, 1.3])

    def call(given):
        return lambda *inputs: modules[head.FUSED].FusedLinearForPPO()(*inputs, given)

    found = run(call(temperature), torch.float64)
    apart = [run(call(t), torch.float64) for t in temperature.tolist()]
    for one, part in zip(found[:3], zip(*apart, strict=True), strict=False):
        torch.testing.assert_close(one, torch.stack([part[0][0], part[1][1]]), rtol=1e-6, atol=1e-9)


def test_the_triton_head_gives_flat_results(modules):
    """Its kernels need a GPU: held to the torch backend's numbers."""
    theirs = run(modules[head.FUSED].FusedLinearForPPO(), torch.float32)
    verl.fuse()
    for module in (modules[head.KERNEL], modules["other"]):
        ours = run(module.linear_cross_entropy, torch.float32)
        assert ours[0].shape == (14,)
        assert max(errors([ours[0].view(2, 7), ours[1].view(2, 7), *ours[2:]], [x.double() for x in theirs])) < 1e-6


def test_a_reduced_loss_keeps_verl_s_head(modules, monkeypatch):
    given = ("mean", None)
    calls = []
    monkeypatch.setattr(modules[head.KERNEL], "linear_cross_entropy", lambda *args: calls.append(args))
    verl.fuse()
    modules[head.KERNEL].linear_cross_entropy(*inputs(torch.float32), 1.0, *given)
    assert [args[4:] for args in calls] == [given]


def test_fuse_and_unfuse(modules):
    before = modules[head.FUSED].FusedLinearForPPO.forward, modules[head.KERNEL].linear_cross_entropy
    for _ in range(2):
        verl.fuse()
    assert modules[head.FUSED].FusedLinearForPPO.forward is head.forward
    assert modules["other"].linear_cross_entropy is head.linear_cross_entropy
    for _ in range(2):
        verl.unfuse()
    assert (modules[head.FUSED].FusedLinearForPPO.forward, modules[head.KERNEL].linear_cross_entropy) == before
    assert modules["other"].linear_cross_entropy is before[1]


def test_another_forward_of_verl_is_named(modules):
    modules[head.FUSED].FusedLinearForPPO.forward = lambda self, hidden, weight: None
    with pytest.raises(ValueError, match=r"^FusedLinearForPPO.forward: got the parameters \(self, hidden, weight\)"):
        verl.fuse()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_patched_functions(dtype, modules):
    functions, truth = modules[head.FUNCTIONS], {}
    for patched in (False, True):
        if patched:
            verl.patch()
            assert modules["other"].logprobs_from_logits is compat.logprobs_from_logits
        hidden, weight, ids = inputs(dtype)
        logits = (hidden @ weight.T).detach().requires_grad_()
        for name in head.NAMES:
            args = (logits, ids) if name.startswith("logprobs") else (logits,)
            if name.endswith("chunking"):
                args = (logits.flatten(0, 1),)
            out = getattr(functions, name)(*args)
            found = out.detach(), *torch.autograd.grad(out.square().sum(), logits)
            if patched:
                exact = dtype == torch.float64 and not name.endswith("chunking")
                limit = 1e-12 if exact else 4e-6  # verl's entropy, a difference of two sums, errs by 2e-6 in fp32
                assert max(errors(found, truth[name])) < limit
            else:
                truth[name] = [x.double() for x in found]
    verl.unpatch()
    assert modules["other"].logprobs_from_logits is functions.logprobs_from_logits
    assert functions.logprobs_from_logits is not compat.logprobs_from_logits


def test_the_entropy_is_compiled_as_verl_compiles_it(modules):
    verl.patch()
    compiled = torch.compile(modules[head.FUNCTIONS].entropy_from_logits, dynamic=True, backend="aot_eager")
    logits = torch.randn(5, 11)
    torch.testing.assert_close(compiled(logits), torch.distributions.Categorical(logits=logits).entropy())


@pytest.mark.parametrize("shifted", [False, True], ids=["rolled by verl", "shift_labels"])
def test_verl_s_forward_of_a_model(shifted, modules):
    """verl's own forward with fused kernels on a real Qwen2: it shifts the labels, the head is ours."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.Qwen2Config(
        vocab_size=41, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = transformers.Qwen2ForCausalLM(config), torch.randint(41, (2, 7))
    file = verl_source.lifted("dense", "models/transformers/dense_common.py", lambda node: True)
    labels = {"shift_labels": ids.flip(0).roll(-1, -1)} if shifted else {}

    def call():
        model.zero_grad()
        out = file.forward_with_torch_backend(model, input_ids=ids, return_dict=True, temperature=0.7, **labels)
        (out.log_probs.square().sum() + out.entropy.sum()).backward()
        return [out.log_probs, out.entropy, *(p.grad.clone() for p in model.parameters())]

    theirs = [x.detach().double() for x in call()]
    verl.fuse()
    assert max(errors([x.detach() for x in call()], theirs)) < 5e-6

"""tokenrl.compat.megatron on a group of one; tests/integrations/test_two_processes.py has two ranks."""

import sys
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from tokenrl.compat import megatron


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = tmp_path_factory.mktemp("ranks") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("rows", [(5,), (2, 5), (2, 1, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_cross_entropy_of_every_row(rows, dtype, group):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(*rows, 11, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.randint(11, rows, generator=g)
    weight = torch.rand(rows, generator=g, dtype=torch.float64)
    found = megatron.vocab_parallel_cross_entropy(logits, target, tp_group=group)
    assert found.shape == rows and found.dtype == torch.promote_types(dtype, torch.float32)
    (grad,) = torch.autograd.grad((found * weight).sum(), logits)
    truth = -logits.double().log_softmax(-1).gather(-1, target[..., None])[..., 0]
    (true_grad,) = torch.autograd.grad((truth * weight).sum(), logits)
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.double(), truth, **close)
    torch.testing.assert_close(grad, true_grad, **(close if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-4}))


def test_megatron_s_group_is_the_default(group, monkeypatch):
    state = ModuleType("megatron.core.parallel_state")
    state.get_tensor_model_parallel_group = lambda: group
    for name in ("megatron", "megatron.core"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, state.__name__, state)
    logits, ids = torch.randn(3, 4, 11, dtype=torch.float64, requires_grad=True), torch.randint(11, (3, 4))
    logp = megatron.vocab_parallel_log_probs_from_logits(logits, ids)
    assert torch.equal(logp, -megatron.vocab_parallel_cross_entropy(logits, ids, tp_group=group))
    entropy = megatron.vocab_parallel_entropy_with_chunking(logits, 2)
    assert torch.equal(entropy, megatron.vocab_parallel_entropy(logits))
    truth = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy, truth, rtol=1e-12, atol=1e-12)
    grads = (torch.autograd.grad(x.square().sum(), logits)[0] for x in (entropy, truth))
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"label_smoothing": 0.1}, "^label_smoothing: got 0.1, accepted: 0 "),
        ({"target": None}, "^target: got "),
        ({"vocab_parallel_logits": [1.0]}, "^vocab_parallel_logits: got "),
        ({"target": torch.zeros(4, dtype=torch.int64)}, "ids: got shape"),
        ({"target": torch.full((3,), 11)}, "ids: got values from 11 to 11"),
    ],
    ids=["smoothing", "no target", "a list", "shape", "range"],
)
def test_wrong_arguments_are_named(given, message, group):
    right = {"vocab_parallel_logits": torch.zeros(3, 11), "target": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        megatron.vocab_parallel_cross_entropy(**right | given, tp_group=group)

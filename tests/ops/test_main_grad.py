"""main_grad under a hook on the weight's AccumulateGrad, as Megatron's DistributedDataParallel sets one."""

import pytest
import torch
from cases import device_of, kernel_backends, to_rounding
from torch.utils.checkpoint import checkpoint

import tokenrl

DRAW = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT = torch.randn(2, 3, 4, generator=DRAW), torch.randn(9, 4, generator=DRAW)
IDS, OLD = torch.randint(0, 9, (2, 3), generator=DRAW), torch.randn(2, 3, generator=DRAW) - 2


def policy(weight, main_grad, backend):
    advantages = torch.tensor([1.0, -1.0])
    more = {"main_grad": main_grad, "backend": backend}
    return tokenrl.linear_policy_loss("grpo", HIDDEN, weight, IDS, OLD, advantages, **more)[0]


def logprobs(weight, main_grad, backend):
    return tokenrl.linear_token_logprobs(HIDDEN, weight, IDS, main_grad=main_grad, backend=backend).logp.sum()


def checkpointed(weight, main_grad, backend):
    return checkpoint(logprobs, weight, main_grad, backend, use_reentrant=False)


ON_CPU = pytest.mark.parametrize("backend", [name for name in kernel_backends() if device_of(name).type == "cpu"])


@ON_CPU
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("loss", [policy, logprobs, checkpointed], ids=lambda f: f.__name__)
def test_the_hook_sees_a_gradient_and_leaves_it_out(loss, zeros, backend):
    """It asserts that weight.grad is there, and adds it to main_grad unless the flag says that it is in there."""
    plain = WEIGHT.clone().requires_grad_()
    loss(plain, None, backend).backward()
    weight, seen = torch.nn.Parameter(WEIGHT.clone()), []
    weight.main_grad, weight.grad_added_to_main_grad, weight.zero_out_wgrad = torch.zeros(9, 4), False, zeros
    node = weight.expand_as(weight).grad_fn.next_functions[0][0]

    def hook(*_):
        seen.append(weight.grad is not None)
        if not weight.grad_added_to_main_grad or weight.zero_out_wgrad:
            weight.main_grad.add_(weight.grad)
        weight.grad = None

    node.register_hook(hook)
    for times in (1, 2):
        weight.grad_added_to_main_grad = False
        loss(weight, weight.main_grad, backend).backward()
        assert weight.grad_added_to_main_grad and seen == [True] * times
        to_rounding(weight.main_grad, times * plain.grad)


@ON_CPU
@pytest.mark.parametrize("loss", [policy, logprobs], ids=lambda f: f.__name__)
def test_a_weight_without_the_flag_gets_no_grad(loss, backend):
    weight, main_grad = torch.nn.Parameter(WEIGHT.clone()), torch.zeros(9, 4)
    loss(weight, main_grad, backend).backward()
    assert weight.grad is None and main_grad.any() and not hasattr(weight, "grad_added_to_main_grad")

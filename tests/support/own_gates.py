"""Triton functions of the gates of test_own_objective.py and test_parity_gates.py."""

import triton
import triton.language as tl


@triton.jit
def hinge(s, x, logp, advantage, t, width):
    bound = width * tl.sqrt(t)
    value = -advantage * tl.where(s < bound, s, bound)
    d_s = tl.where(s < bound, -advantage, 0.0)
    return value, d_s, 0.0, False, False, False


@triton.jit
def soft(s, x, logp, advantage, t, width):
    tanh = 2 * tl.sigmoid(2 * s / width) - 1
    return -advantage * width * tanh, -advantage * (1 - tanh * tanh), 0.0, False, False, False


@triton.jit
def soft_without_chain_rule(s, x, logp, advantage, t, width):
    tanh = 2 * tl.sigmoid(2 * s / width) - 1
    return -advantage * width * tanh, -advantage * width * (1 - tanh * tanh), 0.0, s > width, False, False

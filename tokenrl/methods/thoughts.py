"""Thoughts inside the text: Quiet-STaR's rewards of a thought after each token, CoT2's steps of several tokens.

    reward = thought_rewards(logp_after_thought, base_logp, passes=2, mask=mask)
    logp = token_logprobs(thought_logits, thought_ids, temperature=TEMPERATURE, outputs=["logp"]).logp.mean(-1)
    loss, _ = tokenrl.policy_loss("reinforce", logp, None, reward, advantages_per="token", mask=mask)
    loss = SCALE * loss + 0.5 * base_loss + 0.5 * loss_after_thought

    temperature = (ids != -100).sum(-1).clamp(min=1).float()                   # ids [B, T, K], the last step has one
    logp = multi_token_logp(token_logprobs(logits, ids, temperature=temperature, outputs=["logp"]).logp, ids)
    loss, _ = tokenrl.policy_loss(COT2, logp, old_logp, advantages, ref_logp=ref_logp, kl_coef=0.1)
    loss, _ = tokenrl.topk_distillation_loss("soft_ce", logp_topk, target_topk.log(), rest="truncated")   # CSFT

Source: Quiet-STaR, arXiv 2403.09629 (authors' code); CoT2, arXiv 2505.23648 (authors' code).
"""

import torch
from torch import Tensor

from ..batch.checks import check_constant, check_floats, check_integers, check_name
from ..batch.layout import layout_of
from ..errors import described, wrong
from ..objectives.policy import objective

TEMPERATURE, SCALE = 3.0, 1e6  # of Quiet-STaR's log-probs of thoughts, and the factor of its loss of them
COT2 = objective("ppo", eps_low=0.1, eps_high=0.1)
WORSE = ("zero", "keep")
HOWS = ("sum", "mean")


def thought_rewards(
    logp: Tensor, base_logp: Tensor, *, passes: int = 1, worse: str = "zero", mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """R_t = sum_j (logp_{t,j} - base_logp_{t+j}), j = 0 .. J - 1, of base_logp's shape and dtype: how much better a
    thought at t makes the next J tokens. Without gradient.

    (The authors leave out the last J tokens of each row.)

    Args:
        logp: fp32 or fp64 [.., J], of token t + j after a thought at t; a constant.
        base_logp: fp32 or fp64 [B, T], or packed [N] with cu_seqlens, of the text itself; a constant.
        passes: thoughts that were tried at each t, rows of [B, T] one after another of the same text: their mean is
            subtracted.
        worse: what a thought below that mean gets, "zero" (authors' code), or "keep", what it has.
        mask: bool; tokens that are masked or past the end of their sequence, of which nothing is read, add nothing, and
            a masked t has no reward.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
    """
    check_name("worse", worse, WORSE)
    for name, x in (("logp", logp), ("base_logp", base_logp)):
        check_floats(name, x)
        check_constant(name, x)
    layout = layout_of(base_logp, mask=mask, cu_seqlens=cu_seqlens, name="base_logp")
    if logp.shape[:-1] != base_logp.shape or logp.device != base_logp.device:
        raise wrong("logp", described(logp), f"{[*base_logp.shape, 'J']} on {base_logp.device}")
    base, after = layout.flat_tokens("base_logp", base_logp, torch.float64), logp.flatten(0, -2).double()
    valid, rows = layout.valid(), layout.rows()
    reward = torch.zeros_like(base)
    for j in range(min(after.shape[1], len(base))):
        end = len(base) - j
        counted = valid[:end] & valid[j:] & (rows[:end] == rows[j:])
        reward[:end] += torch.where(counted, after[:end, j] - base[j:], 0)
    reward = _centred(reward.view(layout.shape), passes, layout.width is not None)
    reward = reward.clamp(min=0) if worse == "zero" else reward
    return torch.where(valid.view(layout.shape), reward, 0).to(base_logp.dtype)


def _centred(reward: Tensor, passes: int, padded: bool) -> Tensor:
    if passes == 1:
        return reward
    if not padded or not isinstance(passes, int) or passes < 1 or reward.shape[0] % passes:
        raise wrong("passes", passes, f"1, or a divisor of the {reward.shape[0]} rows of a padded batch")
    of_texts = reward.view(-1, passes, reward.shape[1])
    return (of_texts - of_texts.mean(1, keepdim=True)).view(reward.shape)


def multi_token_logp(logp: Tensor, ids: Tensor, *, how: str = "sum") -> Tensor:
    """[..], of the K tokens that were drawn together at a step, so that policy_loss makes their ratio.

        "sum"     of logits / K, as CoT2 normalises what it samples (temperature=K)
        "mean"    of the logits as they are: the ratio is the geometric mean

    Args:
        logp: fp32 or fp64 [.., K], of token_logprobs of these ids, with its gradient.
        ids: integers [.., K], of which -100 is none.
        how: "sum" or "mean".
    """
    check_name("how", how, HOWS)
    check_floats("logp", logp)
    check_integers("ids", ids)
    if ids.shape != logp.shape:
        raise wrong("ids", f"shape {list(ids.shape)}", f"that of logp, {list(logp.shape)}")
    drawn = ids != -100
    total = torch.where(drawn, logp, 0).sum(-1)
    return total if how == "sum" else total / drawn.sum(-1).clamp(min=1)

"""The eager spellings: each op in plain torch, as trainers write it."""

import math

import torch
from torch import Tensor
from torch.nn.functional import kl_div


def eager_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """As trainers write it: an fp32 copy, log_softmax, gather, entropy."""
    logp = torch.log_softmax(logits.float(), -1)
    return logp.gather(-1, ids[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def eager_forward_kl(logits: Tensor, other_logits: Tensor) -> tuple[Tensor]:
    """D(r || p) of two fp32 copies, as TRL's GKDTrainer writes it with beta = 0."""
    log_p, log_r = (torch.log_softmax(x.float(), -1) for x in (logits, other_logits))
    return (kl_div(log_p, log_r, reduction="none", log_target=True).sum(-1),)


def eager_jsd(logits: Tensor, other_logits: Tensor) -> tuple[Tensor]:
    """As TRL's GKDTrainer writes it, with beta = 1/2."""
    log_p, log_r = (torch.log_softmax(x.float(), -1) for x in (logits, other_logits))
    log_m = torch.logsumexp(torch.stack([log_p, log_r]) - math.log(2), dim=0)
    parts = (kl_div(log_m, x, reduction="none", log_target=True) for x in (log_p, log_r))
    return (0.5 * sum(parts).sum(-1),)


EAGER_DIVERGENCES = {"forward_kl": eager_forward_kl, "jsd": eager_jsd}


def eager_ctpo(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor]:
    """CTPO as its authors' trainer writes it, in plain torch."""
    m = mask.float()
    d = (logp - old_logp).clamp(-20, 20) * m
    t = mask.cumsum(-1).clamp(min=1)
    s = (d.cumsum(-1).detach() + logp - logp.detach()).clamp(max=10)
    width = t.float() ** 0.5
    a = advantages[:, None]
    unclipped = -a * s.exp()
    clipped = -a * torch.minimum(torch.maximum(s, -0.025 * width), 0.05 * width).exp()
    loss = torch.maximum(unclipped, clipped)
    loss = torch.where(a < 0, torch.minimum(loss, -a * (0.05 * width).exp()), loss)
    return (((loss * m).sum(-1) / m.sum(-1).clamp(min=1)).mean(),)


def eager_linear_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return eager_logprobs(torch.nn.functional.linear(hidden, weight), ids)


def eager_linear_ctpo(
    hidden: Tensor, weight: Tensor, ids: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor]:
    """All logits, their log-probs, CTPO; without the entropies, which its loss does not need."""
    logits = torch.nn.functional.linear(hidden, weight)
    logp = torch.log_softmax(logits.float(), -1).gather(-1, ids[..., None]).squeeze(-1)
    return eager_ctpo(logp, old_logp, advantages, mask)

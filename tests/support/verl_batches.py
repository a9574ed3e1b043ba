"""verl's policy losses on batches: what the tests of tokenrl.integrations.verl share."""

import torch
import verl_source


def batch(seed, spread, per_token, rows=6, width=9):
    """logp, old_logp, advantages [B, T], mask: with holes, an empty row and one of A = 0; both are log-probs."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    base, x = -0.05 - normal(rows, width).abs(), spread * normal(rows, width)
    mask = torch.rand(rows, width, generator=g) < 0.75
    mask[1] = False
    advantages = normal(rows, width) if per_token else normal(rows, 1).expand(rows, width).clone()
    advantages[2] = 0
    logp, old = torch.where(x > 0, base, base + x), torch.where(x > 0, base - x, base)
    return logp, old, advantages, mask


def evaluated(function, given, mode, info, weight, **options):
    logp, old, advantages, mask = given
    logp = logp.clone().requires_grad_()
    torch.manual_seed(0)  # clip_cov draws
    loss, metrics = function(
        old_log_prob=old, log_prob=logp, advantages=advantages, response_mask=mask, loss_agg_mode=mode,
        config=verl_source.actor_config(mode, info, **options), rollout_is_weights=weight,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), logp.grad, metrics

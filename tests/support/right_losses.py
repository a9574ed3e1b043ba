"""Losses as trainers write them in torch, each the row of the table that it is named after."""

import torch

RIGHT = {}


def row(name, **settings):
    """Registers a loss under its row; settings: of the batch that it is for."""

    def registered(function):
        RIGHT[name if name not in RIGHT else f"{name}, {function.__name__}"] = (name, function, settings)
        return function

    return registered


def selective_log_softmax(logits, ids):
    """As TRL: the logit less the logsumexp."""
    return logits.gather(-1, ids[..., None]).squeeze(-1) - torch.logsumexp(logits, -1)


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def clipped(ratio, advantages, low, high):
    """As verl."""
    return torch.maximum(-advantages * ratio, -advantages * torch.clamp(ratio, 1 - low, 1 + high))


@row("ppo")
def ppo(logits, ids, old_logp, advantages, mask, temperature):
    logits = logits / temperature
    log_probs = torch.nn.functional.log_softmax(logits, dim=-1)
    logp = torch.gather(log_probs, 2, ids.unsqueeze(2)).squeeze(2)
    ratio = (logp - old_logp).exp()
    surrogate = torch.min(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    return -masked_mean(surrogate, mask)


@row("grpo")
def grpo_trl(logits, ids, old_logp, advantages, mask, temperature):
    per_token_logps = selective_log_softmax(logits / temperature, ids)
    coef_1 = torch.exp(per_token_logps - old_logp)
    coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.2)
    advantages = advantages.unsqueeze(1)
    per_token_loss = -torch.min(coef_1 * advantages, coef_2 * advantages)
    return ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()


@row("grpo", kl_coef=0.04)
def with_reference(logp, old_logp, ref_logp, advantages, mask, kl_coef):
    delta = ref_logp - logp
    per_token_kl = torch.exp(delta) - delta - 1
    loss = clipped(torch.exp(logp - old_logp), advantages[:, None], 0.2, 0.2) + kl_coef * per_token_kl
    return ((loss * mask).sum(-1) / mask.sum(-1)).mean()


@row("grpo")
def by_loops(logp, old_logp, advantages, mask):
    total = 0.0
    for i in range(len(logp)):
        ratio = (logp[i][mask[i]] - old_logp[i][mask[i]]).exp()
        total = total + clipped(ratio, advantages[i], 0.2, 0.2).mean()
    return total / len(logp)


@row("dr_grpo")
def dr_grpo(logits, ids, old_logp, advantages, mask, temperature):
    logp = selective_log_softmax(logits.float() / temperature, ids)
    loss = clipped((logp - old_logp).exp(), advantages[:, None], 0.2, 0.2)
    return (loss * mask).sum() / (loss.size(0) * loss.size(1))


@row("dapo")
def dapo(logp, old_logp, advantages, mask, eps_low, eps_high):
    negative_approx_kl = torch.clamp(logp - old_logp, min=-20.0, max=20.0)
    return masked_mean(clipped(torch.exp(negative_approx_kl), advantages[:, None], eps_low, eps_high), mask)


@row("bnpo")
def bnpo(hidden, weight, ids, old_logp, advantages, mask, temperature):
    logp = selective_log_softmax(hidden @ weight.t() / temperature, ids)
    loss = clipped(torch.exp(logp - old_logp), advantages[:, None], 0.2, 0.2)
    return (loss * mask).sum() / mask.sum().clamp(min=1.0)


@row("ctpo_fixed")
def with_dual_clip(logp, old_logp, advantages, mask):
    log_ratio = (logp - old_logp) * mask
    prefix = torch.cumsum(log_ratio, -1)
    ratio = (prefix.detach() + logp - logp.detach()).clamp(max=10.0).exp()
    a = advantages[:, None].expand_as(ratio)
    loss = clipped(ratio, a, 0.2, 0.2)
    loss = torch.where(a < 0, torch.min(-a * 3.0, loss), loss)
    return ((loss * mask).sum(1) / mask.sum(1)).mean()


@row("gspo")
def gspo(logits, ids, old_logp, advantages, mask, temperature):
    log_ratio = selective_log_softmax(logits / temperature, ids) - old_logp
    log_importance_weights = (log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
    return clipped(torch.exp(log_importance_weights.unsqueeze(-1)), advantages[:, None], 3e-4, 4e-4).mean()


@row("gspo_token")
def gspo_token(logp, old_logp, advantages, mask):
    negative_approx_kl = logp - old_logp
    lengths = mask.sum(-1).clamp(min=1)
    of_sequence = (negative_approx_kl * mask).sum(-1) / lengths
    log_ratio = logp - logp.detach() + of_sequence.detach().unsqueeze(-1)
    loss = clipped(torch.clamp(log_ratio, max=10.0).exp(), advantages[:, None], 3e-4, 4e-4)
    return ((loss * mask).sum(-1) / lengths).mean()


@row("luspo")
def luspo(logp, old_logp, advantages, mask):
    weights = (((logp - old_logp) * mask).sum(-1) / mask.sum(-1)).exp()
    loss = clipped(weights, advantages, 2e-3, 2.5e-3)
    return (loss * mask.sum(-1)).mean()


@row("gmpo")
def gmpo(logp, old_logp, advantages, mask):
    x, sign = logp - old_logp, torch.sign(advantages)[:, None]
    kept = sign * torch.min(sign * x, sign * x.clamp(-0.4, 0.4))
    ratio = torch.exp((kept * mask).sum(-1) / (mask.sum(-1) + 1e-8))
    return -(advantages * ratio).mean()


@row("cispo")
def cispo(logits, ids, old_logp, advantages, mask, temperature):
    logp = selective_log_softmax(logits / temperature, ids)
    weights = torch.exp(logp - old_logp).clamp(max=5.0).detach()
    return masked_mean(-weights * advantages.unsqueeze(1) * logp, mask)


@row("sapo")
def sapo(logp, old_logp, advantages, mask):
    ratio, a = torch.exp(logp - old_logp), advantages.unsqueeze(1).expand_as(logp)
    soft = torch.empty_like(ratio)
    for chosen, tau in ((a > 0, 1.0), (a <= 0, 1.05)):
        soft[chosen] = torch.sigmoid(tau * (ratio[chosen] - 1)) * 4 / tau
    return ((-soft * a * mask).sum(-1) / mask.sum(-1)).mean()


@row("ratio")
def importance_weighted(logp, old_logp, advantages, mask):
    return -masked_mean((logp - old_logp).exp() * advantages.unsqueeze(-1), mask)


@row("reinforce")
def reinforce(logits, ids, advantages, mask, temperature):
    flat = torch.nn.functional.cross_entropy((logits / temperature).flatten(0, 1), ids.flatten(), reduction="none")
    return masked_mean(flat.view(ids.shape) * advantages[:, None], mask)


@row("kimi15")
def kimi15(logp, old_logp, advantages, mask):
    return masked_mean(-advantages[:, None] * logp + 0.05 * (logp - old_logp) ** 2, mask)


@row("topr_roll")
def topr(logp, old_logp, advantages, mask):
    a = advantages.unsqueeze(1)
    weight = torch.where(a > 0, 1.0, torch.exp(logp - old_logp).clamp(max=1.0)).detach()
    return ((-weight * a * logp * mask).sum(1) / mask.sum(1)).mean()


@row("dppo_tv")
def dppo(logp, old_logp, advantages, mask):
    a, new, old = advantages[:, None], logp.detach().exp(), old_logp.exp()
    drop = ((a > 0) & (new - old > 0.15)) | ((a <= 0) & (old - new > 0.15))
    weight = torch.exp(logp.detach() - old_logp).clamp(max=20.0) * ~drop
    return (-weight * a * logp * mask).sum(-1).div(mask.size(1)).mean()


@row("vespo")
def vespo(logp, old_logp, advantages, mask):
    log_w = torch.clamp(logp - old_logp, -20.0, 20.0).mul(mask).sum(-1, keepdim=True).clamp(-20.0, 20.0).detach()
    k, lam = (torch.where(advantages[:, None] >= 0, *pair) for pair in ((2.0, 3.0), (3.0, 2.0)))
    phi = torch.exp(lam + k * log_w - lam * torch.exp(log_w))
    return masked_mean(-phi * advantages[:, None] * logp, mask)


@row("ctpo")
def ctpo(logits, ids, old_logp, advantages, mask, temperature):
    logp = selective_log_softmax(logits / temperature, ids)
    summed = torch.cumsum((logp - old_logp) * mask, dim=-1)
    t = torch.cumsum(mask, dim=-1).clamp(min=1).float()
    log_rho = torch.clamp(logp - logp.detach() + summed.detach(), max=10.0)
    inside = torch.clamp(log_rho, -0.025 * t**0.5, 0.05 * t**0.5)
    a = advantages.unsqueeze(-1)
    loss = torch.maximum(-a * log_rho.exp(), -a * inside.exp())
    loss = torch.where(a < 0, torch.min(loss, -a * torch.exp(0.05 * t**0.5)), loss)
    return ((loss * mask).sum(-1) / mask.sum(-1)).mean()


@row("ctpo_geomean")
def ctpo_geomean(logp, old_logp, advantages, mask, eps_low, eps_high, eps_dual, power):
    t = mask.cumsum(-1).clamp(min=1).to(logp.dtype)
    mean = ((logp - old_logp) * mask).cumsum(-1) / t
    log_rho = (logp - logp.detach() + mean.detach()).clamp(max=10.0)
    width, a = t**power, advantages[:, None]
    loss = torch.max(-a * log_rho.exp(), -a * torch.clamp(log_rho, -eps_low * width, eps_high * width).exp())
    loss = torch.where(a < 0, torch.min(loss, -a * (eps_dual * width).exp()), loss)
    return ((loss * mask).sum(-1) / mask.sum(-1)).mean()


@row("minpro")
def minpro(logp, old_logp, advantages, mask):
    losses = []
    for i in range(len(logp)):
        p = logp[i][mask[i]]
        x = (p - old_logp[i][mask[i]]).detach()
        lowest = torch.cat([x.new_zeros(1), torch.cummin(x, 0).values[:-1]])
        losses.append(-torch.exp(lowest + x).clamp(0.2, 5.0) * advantages[i] * p)
    return torch.cat(losses).mean()


@row("ba")
def balanced(logp, old_logp, advantages, mask, group_ids):
    loss, total = clipped((logp - old_logp).exp(), advantages[:, None], 0.2, 0.2), 0.0
    groups = group_ids.unique()
    for group in groups:
        for sign in (1, -1):
            rows = (group_ids == group) & (torch.sign(advantages) == sign)
            if rows.any():
                share = rows.sum() / (group_ids == group).sum()
                total = total + share * (loss[rows] * mask[rows]).sum() / mask[rows].sum()
    return total / len(groups)

"""Losses as trainers write them in torch, each with the mistake that it is named after."""

import torch
import torch.nn.functional as F
from right_losses import clipped, masked_mean, selective_log_softmax

WRONG = {}


def mistaken(name, objective, **settings):
    """Registers a loss under its mistake; objective: what it should be; settings: of the batch."""

    def registered(function):
        WRONG[f"{name}: {function.__name__}"] = (name, objective, function, settings)
        return function

    return registered


def per_row(loss, mask):
    return ((loss * mask).sum(-1) / mask.sum(-1)).mean()


def banded(log_rho, t, advantages):
    """CTPO's clip."""
    log_rho, a, width = log_rho.clamp(max=10.0), advantages[:, None], t**0.5
    loss = torch.max(-a * log_rho.exp(), -a * torch.clamp(log_rho, -0.025 * width, 0.05 * width).exp())
    return torch.where(a < 0, torch.min(loss, -a * torch.exp(0.05 * width)), loss)


def stopped(summed, logp):
    return summed.detach() + logp - logp.detach()


@mistaken("exclusive instead of inclusive prefix", "ctpo")
def sum_of_those_before(logp, old_logp, advantages, mask):
    x = (logp - old_logp) * mask
    before = F.pad(x.cumsum(-1), (1, 0))[:, :-1]
    return per_row(banded(stopped(before, logp), mask.cumsum(-1).clamp(min=1), advantages), mask)


@mistaken("inclusive instead of exclusive prefix", "minpro")
def minimum_with_itself(logp, old_logp, advantages, mask):
    x = torch.where(mask, logp - old_logp, torch.inf).detach()
    lowest = x.cummin(-1).values
    weight = torch.exp(torch.where(mask, lowest + x, 0)).clamp(0.2, 5.0)
    return masked_mean(-weight * advantages[:, None] * logp, mask)


@mistaken("position counted over padding", "ctpo")
def arange(logp, old_logp, advantages, mask):
    summed = ((logp - old_logp) * mask).cumsum(-1)
    t = torch.arange(1, logp.shape[1] + 1, dtype=logp.dtype)
    return per_row(banded(stopped(summed, logp), t, advantages), mask)


@mistaken("position counted from 0", "ctpo_geomean")
def from_zero(logp, old_logp, advantages, mask):
    t = (mask.cumsum(-1) - 1).clamp(min=0).to(logp.dtype)
    mean = ((logp - old_logp) * mask).cumsum(-1) / t.clamp(min=1)
    log_rho, a, width = stopped(mean, logp).clamp(max=10.0), advantages[:, None], t**-0.5
    loss = torch.max(-a * log_rho.exp(), -a * torch.clamp(log_rho, -0.025 * width, 0.05 * width).exp())
    return per_row(torch.where(a < 0, torch.min(loss, -a * torch.exp(0.05 * width)), loss), mask)


@mistaken("clip in ratio instead of log space", "ctpo")
def one_plus_epsilon(logp, old_logp, advantages, mask, eps_low, eps_high, eps_dual):
    ratio = stopped(((logp - old_logp) * mask).cumsum(-1), logp).clamp(max=10.0).exp()
    width, a = mask.cumsum(-1).clamp(min=1).sqrt(), advantages[:, None].expand_as(ratio)
    loss = torch.max(-a * ratio, -a * torch.clamp(ratio, 1 - eps_low * width, 1 + eps_high * width))
    return per_row(torch.where(a < 0, torch.min(loss, -a * (1 + eps_dual * width)), loss), mask)


@mistaken("clip in log instead of ratio space", "dapo")
def log_bounds(logp, old_logp, advantages, mask):
    log_ratio, a = logp - old_logp, advantages[:, None]
    return masked_mean(-torch.min(log_ratio.exp() * a, log_ratio.clamp(-0.2, 0.28).exp() * a), mask)


@mistaken("mean over padded length", "grpo")
def mean_of_rows(logits, ids, old_logp, advantages, mask, temperature):
    logp = selective_log_softmax(logits / temperature, ids)
    return (clipped((logp - old_logp).exp(), advantages[:, None], 0.2, 0.2) * mask).mean(-1).mean()


@mistaken("mean over padded length", "dapo")
def mean_of_all(logp, old_logp, advantages, mask):
    return (clipped((logp - old_logp).exp(), advantages[:, None], 0.2, 0.28) * mask).mean()


@mistaken("sign subsets swapped", "sapo")
def other_temperature(logp, old_logp, advantages, mask):
    a = advantages[:, None]
    tau = torch.where(a > 0, 1.05, 1.0)
    return per_row(-torch.sigmoid(tau * ((logp - old_logp).exp() - 1)) * 4 / tau * a, mask)


@mistaken("sign subsets swapped", "grpo")
def minimum_of_losses(logp, old_logp, advantages, mask):
    ratio, a = (logp - old_logp).exp(), advantages[:, None]
    return per_row(torch.min(-ratio * a, -ratio.clamp(0.8, 1.2) * a), mask)


@mistaken("missing suffix sum", "through")
def stopped_prefix(logp, old_logp, advantages, mask):
    ratio = stopped(((logp - old_logp) * mask).cumsum(-1), logp).exp()
    return masked_mean(clipped(ratio, advantages[:, None], 0.2, 0.2), mask)


@mistaken("missing suffix sum", "gspo")
def own_share(logp, old_logp, advantages, mask):
    length = mask.sum(-1, keepdim=True)
    mean = ((logp - old_logp) * mask).sum(-1, keepdim=True) / length
    ratio = (mean.detach() + (logp - logp.detach()) / length).exp()
    return per_row(clipped(ratio, advantages[:, None], 3e-4, 4e-4), mask)


@mistaken("gradient through the whole ratio", "ctpo")
def not_stopped(logp, old_logp, advantages, mask):
    summed = ((logp - old_logp) * mask).cumsum(-1)
    return per_row(banded(summed, mask.cumsum(-1).clamp(min=1), advantages), mask)


@mistaken("untempered log-probs", "grpo")
def raw_logits(logits, ids, old_logp, advantages, mask):
    logp = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    return per_row(clipped((logp - old_logp).exp(), advantages[:, None], 0.2, 0.2), mask)


@mistaken("ids shifted by one", "dapo")
def shifted_as_in_a_causal_model(logits, ids, old_logp, advantages, mask, temperature):
    logp = selective_log_softmax(logits[:, :-1] / temperature, ids[:, 1:])
    loss = clipped((logp - old_logp[:, 1:]).exp(), advantages[:, None], 0.2, 0.28)
    return masked_mean(loss, mask[:, 1:])


@mistaken("ids shifted by one", "grpo")
def rolled(logits, ids, old_logp, advantages, mask, temperature):
    logp = selective_log_softmax(logits / temperature, torch.roll(ids, -1, dims=1))
    return per_row(clipped((logp - old_logp).exp(), advantages[:, None], 0.2, 0.2), mask)


@mistaken("old and new exchanged", "grpo")
def old_over_new(logp, old_logp, advantages, mask):
    return per_row(clipped((old_logp - logp).exp(), advantages[:, None], 0.2, 0.2), mask)


@mistaken("old and new exchanged", "ctpo")
def old_over_new_of_prefixes(logp, old_logp, advantages, mask):
    x = (old_logp - logp) * mask
    summed = x.cumsum(-1).detach() + x - x.detach()
    return per_row(banded(summed, mask.cumsum(-1).clamp(min=1), advantages), mask)


@mistaken("sum instead of mean", "dapo")
def summed_tokens(logp, old_logp, advantages, mask):
    return (clipped((logp - old_logp).exp(), advantages[:, None], 0.2, 0.28) * mask).sum()


@mistaken("sum instead of mean", "grpo")
def summed_rows(logp, old_logp, advantages, mask):
    loss = clipped((logp - old_logp).exp(), advantages[:, None], 0.2, 0.2)
    return ((loss * mask).sum(-1) / mask.sum(-1)).sum()


@mistaken("aggregated as token-mean", "grpo")
def of_tokens(logp, old_logp, advantages, mask):
    return masked_mean(clipped((logp - old_logp).exp(), advantages[:, None], 0.2, 0.2), mask)


@mistaken("KL inside instead of outside the clip", "grpo", kl_coef=0.04)
def penalised_advantage(logp, old_logp, ref_logp, advantages, mask, kl_coef):
    delta = ref_logp - logp
    a = advantages[:, None] - kl_coef * (delta.exp() - delta - 1)
    ratio = torch.exp(logp - old_logp)
    return per_row(-torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a), mask)


@mistaken("KL inside instead of outside the clip", "ppo", kl_coef=0.1, kl="kl_k1")
def penalised_reward(logp, old_logp, ref_logp, advantages, mask, kl_coef):
    a = advantages[:, None] - kl_coef * (logp - ref_logp).detach()
    return masked_mean(clipped((logp - old_logp).exp(), a, 0.2, 0.2), mask)


@mistaken("KL by kl_k1", "grpo", kl_coef=0.04)
def another_estimator(logp, old_logp, ref_logp, advantages, mask, kl_coef):
    loss = clipped((logp - old_logp).exp(), advantages[:, None], 0.2, 0.2) + kl_coef * (logp - ref_logp)
    return per_row(loss, mask)


@mistaken("KL the wrong way round", "grpo", kl_coef=0.04)
def reference_first(logp, old_logp, ref_logp, advantages, mask, kl_coef):
    delta = logp - ref_logp
    loss = clipped((logp - old_logp).exp(), advantages[:, None], 0.2, 0.2) + kl_coef * (delta.exp() - delta - 1)
    return per_row(loss, mask)


@mistaken("mask multiplied into the ratio", "grpo")
def masked_ratio(logp, old_logp, advantages, mask):
    ratio = (logp - old_logp).exp() * mask
    loss = clipped(ratio, advantages[:, None], 0.2, 0.2)
    return (loss.sum(-1) / mask.sum(-1)).mean()


@mistaken("mask multiplied into the ratio", "ppo")
def masked_ratio_over_all(logp, old_logp, advantages, mask):
    ratio, a = (logp - old_logp).exp() * mask, advantages[:, None]
    return -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()


@mistaken("mask left out", "dapo")
def every_cell(logp, old_logp, advantages):
    return clipped((logp - old_logp).exp(), advantages[:, None], 0.2, 0.28).mean()


@mistaken("advantages normalised twice", "grpo")
def normalised_again(logp, old_logp, advantages, mask):
    a = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    return per_row(clipped((logp - old_logp).exp(), a[:, None], 0.2, 0.2), mask)


@mistaken("advantages normalised twice", "cispo")
def whitened_over_tokens(logp, old_logp, advantages, mask):
    a = advantages[:, None].expand_as(logp)
    mean = masked_mean(a, mask)
    a = (a - mean) * torch.rsqrt(masked_mean((a - mean) ** 2, mask) + 1e-8)
    return masked_mean(-(logp - old_logp).exp().clamp(max=5.0).detach() * a * logp, mask)


@mistaken("advantages normalised twice", "dapo")
def normalised_in_groups(logp, old_logp, advantages, mask):
    groups = advantages.view(-1, 4)
    a = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1, 1)
    return masked_mean(clipped((logp - old_logp).exp(), a, 0.2, 0.28), mask)


@mistaken("bf16 log-probs", "grpo")
def autocast_softmax(logits, ids, old_logp, advantages, mask, temperature):
    logp = F.log_softmax(logits.bfloat16() / temperature, -1).gather(-1, ids[..., None]).squeeze(-1).float()
    return per_row(clipped((logp - old_logp).exp(), advantages[:, None], 0.2, 0.2), mask)


@mistaken("bf16 log-probs", "grpo")
def stored_in_half(logits, ids, old_logp, advantages, mask, temperature):
    logp = selective_log_softmax(logits / temperature, ids).to(torch.bfloat16)
    return per_row(clipped((logp.float() - old_logp).exp(), advantages[:, None], 0.2, 0.2), mask)


@mistaken("weight not detached", "cispo")
def forgotten_detach(logp, old_logp, advantages, mask):
    return masked_mean(-(logp - old_logp).exp().clamp(max=5.0) * advantages[:, None] * logp, mask)


@mistaken("no dual clip", "ctpo")
def without_a_floor(logp, old_logp, advantages, mask):
    width, a = mask.cumsum(-1).clamp(min=1).sqrt(), advantages[:, None]
    log_rho = stopped(((logp - old_logp) * mask).cumsum(-1), logp).clamp(max=10.0)
    return per_row(torch.max(-a * log_rho.exp(), -a * log_rho.clamp(-0.025 * width, 0.05 * width).exp()), mask)


@mistaken("bounds exchanged", "dapo")
def higher_below(logp, old_logp, advantages, mask):
    return masked_mean(clipped((logp - old_logp).exp(), advantages[:, None], 0.28, 0.2), mask)


@mistaken("clipped on both sides", "grpo")
def clip_alone(logp, old_logp, advantages, mask):
    return per_row(-advantages[:, None] * (logp - old_logp).exp().clamp(0.8, 1.2), mask)


@mistaken("sign of the loss", "dapo")
def maximised(logp, old_logp, advantages, mask):
    return -masked_mean(clipped((logp - old_logp).exp(), advantages[:, None], 0.2, 0.28), mask)

"""Every row of the table against its paper: the formulas typed out in floats and loops, loss and gradient."""

import math

import pytest
import torch
from cases import backends_to_test, device_of, interpreted, on_backends
from paper_detached import DETACHED, clip, diagonal
from paper_forms import MIXED, surrogate
from paper_trainers import TRAINERS

import tokenrl
from tokenrl.objectives.aggregations import AGGREGATIONS
from tokenrl.objectives.gates.bounded import LogBand, PpoClip

INF = math.inf
MASK = [[1, 1, 0, 1, 1], [1, 0, 0, 1, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 1, 0, 0]]
D = [  # log ratios before scaling
    [0.31, -0.42, 9.0, 0.77, -0.15], [-0.83, 9.0, 9.0, 0.29, 9.0], [9.0, 0.58, 0.36, 0.91, -0.24],
    [9.0, 9.0, 9.0, 9.0, 9.0], [0.12, -0.65, -0.37, 9.0, 9.0], [9.0, 9.0, 0.45, 9.0, 9.0],
]  # fmt: skip
LOGP = [[-0.3 - 0.2 * i - 0.13 * j for j in range(5)] for i in range(6)]
SEQUENCE_ADVANTAGES = [1.25, -0.75, 0.5, 2.0, 0.0, -1.5]
TOKEN_ADVANTAGES = [[(-1) ** (i * j) * (0.25 + 0.5 * i - 0.125 * j) for j in range(5)] for i in range(6)]
GROUPS = [4, 4, -2, 9, -2, 4]
TOKEN_WEIGHT = [[0.5 + 0.3 * i - 0.07 * j for j in range(5)] for i in range(6)]


# Each formula takes the valid tokens of a row: d (log ratios), p (log-probs), a (advantages). It gives their losses and
# the matrix of derivatives, jacobian[t][j] = d l_t / d logp_j.


def ppo(eps_low, eps_high, dual=INF, clamp=20):
    def formula(d, p, a):
        losses, slopes = [], []
        for x, adv in zip(d, a, strict=True):
            rho = math.exp(clip(x, -clamp, clamp))
            loss, active = surrogate(rho, adv, 1 - eps_low, 1 + eps_high, dual)
            losses.append(loss)
            slopes.append(-adv * rho if active and abs(x) <= clamp else 0.0)
        return diagonal(losses, slopes)

    return formula


def gspo(eps_low, eps_high):
    """Sequence form: the mean is differentiated, so each token moves the ratio of all."""

    def formula(d, p, a):
        n = len(d)
        ratio = math.exp(sum(d) / n)
        losses, jacobian = [], []
        for adv in a:
            loss, active = surrogate(ratio, adv, 1 - eps_low, 1 + eps_high)
            losses.append(loss)
            jacobian.append([-adv * ratio / n if active else 0.0] * n)
        return losses, jacobian

    return formula


def gspo_token(d, p, a):
    s = sum(d) / len(d)
    ratio = math.exp(min(s, 10))
    losses, slopes = [], []
    for adv in a:
        loss, active = surrogate(ratio, adv, 1 - 3e-4, 1 + 4e-4)
        losses.append(loss)
        slopes.append(-adv * ratio if active and s <= 10 else 0.0)
    return diagonal(losses, slopes)


def cispo(d, p, a):
    weights = [min(math.exp(clip(x, -20, 20)), 5.0) for x in d]
    losses = [-w * adv * logp for w, adv, logp in zip(weights, a, p, strict=True)]
    return diagonal(losses, [-w * adv for w, adv in zip(weights, a, strict=True)])


def ratio(d, p, a):
    losses = [-math.exp(clip(x, -20, 20)) * adv for x, adv in zip(d, a, strict=True)]
    return diagonal(losses, [loss if abs(x) <= 20 else 0.0 for x, loss in zip(d, losses, strict=True)])


def sapo(d, p, a):
    losses, slopes = [], []
    for x, adv in zip(d, a, strict=True):
        tau = 1.0 if adv > 0 else 1.05
        ratio = math.exp(clip(x, -20, 20))
        e = math.exp(-tau * (ratio - 1))
        losses.append(-4 / tau / (1 + e) * adv)
        slopes.append(-adv * ratio * 4 * e / (1 + e) ** 2 if abs(x) <= 20 else 0.0)
    return diagonal(losses, slopes)


def ctpo(mean, power):
    def formula(d, p, a):
        losses, slopes, total = [], [], 0.0
        for t, (x, adv) in enumerate(zip(d, a, strict=True), start=1):
            total += clip(x, -20, 20)
            k = total / t if mean else total
            log_rho, width = min(k, 10), t**power
            low, high, dual = -0.025 * width, 0.05 * width, 0.05 * width
            loss = max(-adv * math.exp(log_rho), -adv * math.exp(clip(log_rho, low, high)))
            if adv < 0:
                loss = min(-adv * math.exp(dual), loss)
            active = log_rho <= high if adv > 0 else low <= log_rho <= dual
            losses.append(loss)
            slopes.append(-adv * math.exp(log_rho) if active and k <= 10 else 0.0)
        return diagonal(losses, slopes)

    return formula


def kl(value, slope):
    def formula(d, p, a):
        s = [clip(x, -20, 20) for x in d]
        return diagonal([value(x) for x in s], [slope(x) if abs(x) < 20 else 0.0 for x in s])

    return formula


def k3(s):
    return math.expm1(-s) + s


PAPER = {
    "ppo": ppo(0.2, 0.2),
    "grpo": ppo(0.2, 0.2),
    "dr_grpo": ppo(0.2, 0.2),
    "dapo": ppo(0.2, 0.28),
    "bnpo": ppo(0.2, 0.2),
    "gspo": gspo(3e-4, 4e-4),
    "luspo": gspo(2e-3, 2.5e-3),
    "gspo_token": gspo_token,
    "cispo": cispo,
    "ratio": ratio,
    "sapo": sapo,
    "lpo": gspo(0.03, 0.03),
    "ctpo": ctpo(mean=False, power=0.5),
    "ctpo_geomean": ctpo(mean=True, power=-0.5),
    "ba": ppo(0.2, 0.2),
    "hapo": ppo(0.2, 0.2, dual=10, clamp=INF),  # with entropies: test_hapo
    "rmt": ppo(0.2, 0.2),  # with next tokens: test_rmt
    "kl_abs": kl(abs, lambda s: math.copysign(1.0, s) if s else 0.0),
    "kl_k1": kl(lambda s: s, lambda s: 1.0),
    "kl_k2": kl(lambda s: s * s / 2, lambda s: s),
    "kl_k3": kl(k3, lambda s: -math.expm1(-s)),
    "kl_k1_unbiased": kl(lambda s: s, lambda s: s),
    "kl_abs_unbiased": kl(abs, lambda s: s),
    "kl_k3_unbiased": kl(k3, lambda s: s),
    **DETACHED,
    **MIXED,
    **TRAINERS,
}
# These compare sequences or tokens of the whole batch: test_batch_forms.py, test_fibration.py.
OF_THE_BATCH = {"real", "fipo", "clip_cov", "kl_cov", "fiberpo_domain", "apc_obj"}
OWN = {
    "ppo": "token-mean", "dapo": "token-mean", "cispo": "token-mean", "minpro": "token-mean",
    "grpo": "seq-mean-token-mean", "gspo": "seq-mean-token-mean", "gspo_token": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean", "ctpo": "seq-mean-token-mean", "ctpo_geomean": "seq-mean-token-mean",
    "dr_grpo": "seq-mean-token-sum-norm", "dppo_tv": "seq-mean-token-sum-norm", "dppo_kl": "seq-mean-token-sum-norm",
    "luspo": "seq-mean-token-sum", "topr": "seq-mean-token-sum", "ba": "balanced",
    "dppo_topk": "seq-mean-token-sum-norm",
    **dict.fromkeys(
        ("ctpo_fixed", "ctpo_geomean_fixed", "sspo", "dhpo", "dhpo_branch", "gmpo", "hmpo", "fiberpo", "topr_roll"),
        "seq-mean-token-mean",
    ),
}  # fmt: skip


def balanced(n, sums):
    weights, groups = [], {g for i, g in enumerate(GROUPS) if n[i]}
    for i, group in enumerate(GROUPS):
        members = [j for j in range(len(n)) if GROUPS[j] == group and n[j]]
        own = [j for j in members if sums[j] * sums[i] > 0]
        weights.append(len(own) / len(members) / sum(n[j] for j in own) / len(groups) if n[i] and own else 0.0)
    return weights


def row_weights(mode, a):
    """The weight of each token of a row, from the table of aggregations."""
    n = [sum(row) for row in MASK]
    rows = sum(count > 0 for count in n)
    groups = len({g for i, g in enumerate(GROUPS) if n[i]})
    in_group = [sum(n[j] for j in range(len(n)) if GROUPS[j] == g) for g in GROUPS]
    return {
        "token-mean": lambda: [1 / sum(n)] * len(n),
        "token-sum": lambda: [1.0] * len(n),
        "seq-mean-token-mean": lambda: [1 / (rows * count) if count else 0.0 for count in n],
        "seq-mean-token-sum": lambda: [1 / rows] * len(n),
        "seq-mean-token-sum-norm": lambda: [1 / (rows * 5)] * len(n),
        "group-mean": lambda: [1 / (groups * count) if count else 0.0 for count in in_group],
        "balanced": lambda: balanced(n, [sum(r[j] for j in range(5) if MASK[i][j]) for i, r in enumerate(a)]),
    }[mode]()


def by_hand(name, mode, a, scale, token_weight):
    """(loss, gradient) in floats."""
    weights = row_weights(mode, a)
    loss, gradient = 0.0, [[0.0] * 5 for _ in MASK]
    for i, row in enumerate(MASK):
        cells = [j for j in range(5) if row[j]]
        if not cells:
            continue
        d, p, adv = [scale * D[i][j] for j in cells], [LOGP[i][j] for j in cells], [a[i][j] for j in cells]
        losses, jacobian = PAPER[name](d, p, adv)
        for t, j in enumerate(cells):
            w = weights[i] * (TOKEN_WEIGHT[i][j] if token_weight else 1.0)
            loss += w * losses[t]
            for u, k in enumerate(cells):
                gradient[i][k] += w * jacobian[t][u]
    return loss, gradient


def by_tokenrl(objective, mode, a, scale, backend="reference", **more):
    def tensor(x):
        return torch.tensor(x, dtype=torch.float64)

    device = device_of(backend)
    given = {"mask": torch.tensor(MASK, dtype=torch.bool), "group_ids": torch.tensor(GROUPS)} | more
    logp = torch.where(given["mask"], tensor(LOGP), torch.nan)
    old = logp - scale * tensor(D)
    logp, given = logp.to(device).requires_grad_(), {k: v.to(device) for k, v in given.items()}
    loss, _ = tokenrl.policy_loss(
        objective, logp, old.to(device), tensor(a).to(device), aggregation=mode, backend=backend, **given
    )
    return loss.detach().cpu(), torch.autograd.grad(loss, logp)[0].cpu()


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        b = torch.as_tensor(b, dtype=torch.float64)
        torch.testing.assert_close(a.double(), b, rtol=1e-12, atol=1e-14)


def test_every_row_has_its_formula():
    assert set(PAPER) | OF_THE_BATCH == set(tokenrl.OBJECTIVES) and not set(PAPER) & OF_THE_BATCH


# inside the band of GSPO, inside that of PPO, across, beyond clamp and cap
@pytest.mark.parametrize("scale", [5e-4, 0.11, 1.0, 27.0])
@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("name", PAPER)
def test_paper(name, mode, scale):
    per_token = [[x] * 5 for x in SEQUENCE_ADVANTAGES]
    same(by_tokenrl(name, mode, SEQUENCE_ADVANTAGES, scale), by_hand(name, mode, per_token, scale, False))
    weight = torch.tensor(TOKEN_WEIGHT, dtype=torch.float64)
    got = by_tokenrl(name, mode, TOKEN_ADVANTAGES, scale, token_weight=weight)
    same(got, by_hand(name, mode, TOKEN_ADVANTAGES, scale, True))


@pytest.mark.parametrize("name", PAPER)
def test_the_aggregation_that_the_paper_prescribes_is_the_default(name):
    mode = OWN.get(name, "token-mean")
    per_token = [[x] * 5 for x in SEQUENCE_ADVANTAGES]
    same(by_tokenrl(name, None, SEQUENCE_ADVANTAGES, 0.11), by_hand(name, mode, per_token, 0.11, False))


@on_backends([name for name in PAPER if tokenrl.OBJECTIVES[name].gate.uses_advantages])
def test_on_policy_every_objective_is_reinforce(name, backend):
    modes = ("token-mean", "balanced")
    if interpreted(backend):  # one by turns: to the row that is interpreted its weights are numbers
        modes = (modes[list(PAPER).index(name) % 2],)
    for mode in modes:
        w = row_weights(mode, [[x] * 5 for x in SEQUENCE_ADVANTAGES])
        scale = 0.5 if name == "opmd" else 1.0
        expected = [[-SEQUENCE_ADVANTAGES[i] * scale * w[i] * m for m in row] for i, row in enumerate(MASK)]
        _, gradient = by_tokenrl(name, mode, SEQUENCE_ADVANTAGES, 0.0, backend)
        same([gradient], [expected])


@pytest.mark.parametrize("backend", backends_to_test())
def test_a_log_band_of_power_zero_is_ppo_with_log_bounds(backend):
    gate = LogBand(0.3, 0.2, eps_dual=0.6, power=0.0)
    band = tokenrl.objective("ctpo", gate=gate, statistic="token", flow="through")
    clipped = PpoClip(1 - math.exp(-0.3), math.exp(0.2) - 1, dual=math.exp(0.6))
    ours = by_tokenrl(band, "token-mean", TOKEN_ADVANTAGES, 1.0, backend)
    same(ours, by_tokenrl(tokenrl.objective("ppo", gate=clipped), "token-mean", TOKEN_ADVANTAGES, 1.0, backend))


def test_balanced_is_a_mean_of_rows_or_of_tokens_in_the_simple_cases():
    one_group = torch.zeros(6, dtype=torch.int64)
    even = torch.tensor([[1, 0, 1, 1, 0]] * 6, dtype=torch.bool)
    got = by_tokenrl("ppo", "balanced", SEQUENCE_ADVANTAGES, 1.0, mask=even, group_ids=one_group)
    expected = by_tokenrl("ppo", "seq-mean-token-mean", SEQUENCE_ADVANTAGES, 1.0, mask=even, group_ids=one_group)
    same(got, expected)
    one_sign = [abs(x) + 0.5 for x in SEQUENCE_ADVANTAGES]
    got = by_tokenrl("ppo", "balanced", one_sign, 1.0, group_ids=one_group)
    same(got, by_tokenrl("ppo", "token-mean", one_sign, 1.0, group_ids=one_group))

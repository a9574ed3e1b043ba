"""A3PO: the log-probs of the proximal policy between those of the rollout and the current ones, without a forward pass.

    prox_logp = proximal_logp(logp.detach(), rollout_logp, versions, step)
    loss, _ = tokenrl.policy_loss("ppo", logp, prox_logp, advantages, mask=mask, rollout_logp=rollout_logp)

which is decoupled PPO: clipped around the proximal policy, with importance weights from it to the rollout's (they are
truncated at 2 unless correction= says otherwise).
"""

import torch
from torch import Tensor

from ..batch.checks import check_constant, check_floats, check_integers, check_name
from ..errors import wrong

MEANS = ("geometric", "arithmetic")


def proximal_logp(
    logp: Tensor, rollout_logp: Tensor, versions: Tensor, current_version: int, *, mean: str = "geometric"
) -> Tensor:
    """Of logp's shape and dtype: (1 - a) rollout_logp + a logp, a = (v - 1 - u) / (v - u) in [0, 1], of the versions v
    of the policy that is trained, v - 1 of the proximal one and u of that which sampled.

    A cell whose log-probs are NaN is NaN. A rollout_logp of -inf, of no probability, stays one in the geometric mean.

    Args:
        logp: fp32 or fp64 of any shape, current, a constant.
        rollout_logp: of that shape, of the policy that sampled.
        versions: integers of that shape, u of each token; where u is negative (a prompt's) or not below v, a = 0.
        current_version: an integer, v.
        mean: "geometric", of probabilities, as above; "arithmetic", log((1 - a) p_rollout + a p).

    Source: arXiv 2512.06547, AReaL loglinear, linear (trainers; without its 1e-10 in the latter's logarithm).
    """
    check_name("mean", mean, MEANS)
    for name, x in (("logp", logp), ("rollout_logp", rollout_logp)):
        check_floats(name, x)
        check_constant(name, x)
    check_integers("versions", versions)
    for name, x in (("rollout_logp", rollout_logp), ("versions", versions)):
        if x.shape != logp.shape or x.device != logp.device:
            given, accepted = (f"{list(y.shape)} on {y.device}" for y in (x, logp))
            raise wrong(name, given, accepted)
    if not isinstance(current_version, int) or isinstance(current_version, bool):
        raise wrong("current_version", current_version, "an integer")
    behind = current_version - versions.double()
    share = torch.where((behind > 0) & (versions >= 0), (behind - 1) / behind, 0)
    old, new = rollout_logp.double(), logp.double()
    if mean == "geometric":
        found = old + torch.where((share == 0) | (old == -torch.inf), 0, share * (new - old))  # of nothing infinite
    else:
        found = torch.logaddexp(old + torch.log1p(-share), torch.where(share == 0, -torch.inf, new + share.log()))
    return found.to(logp.dtype)

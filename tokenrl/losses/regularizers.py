"""What a policy loss is made of beside its objective: a KL penalty and an entropy bonus under the same weights.

loss = sum_t w_t (gate(s_t) + kl_coef kl_t - entropy_coef entropy_t)
"""

import torch
from torch import Tensor

from ..batch.checks import check_constant, check_floats, check_number
from ..batch.layout import Layout
from ..errors import wrong
from ..objectives.policy import Objective, kl_estimator
from ..ops.dispatch import Regularizers


def regularizers_of(
    layout: Layout,
    dtype: torch.dtype,
    ref_logp: Tensor | None,
    kl: str | Objective,
    kl_coef: float,
    entropy_coef: float,
) -> Regularizers:
    """Checked and flat."""
    kl = kl_estimator(kl)
    check_number("kl_coef", kl_coef)
    check_number("entropy_coef", entropy_coef)
    if ref_logp is None and kl_coef != 0:
        raise wrong("ref_logp", None, f"one log-prob per token, {list(layout.shape)}; kl_coef is {kl_coef}")
    if ref_logp is not None:
        check_floats("ref_logp", ref_logp)
        check_constant("ref_logp", ref_logp)
        ref_logp = layout.flat_tokens("ref_logp", ref_logp, dtype)
    return Regularizers(ref_logp, kl, float(kl_coef), float(entropy_coef))

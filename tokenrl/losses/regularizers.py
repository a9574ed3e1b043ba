"""What a policy loss is made of beside its objective: a KL penalty and an entropy bonus.

loss = sum_t w_t gate(s_t) + kl_coef sum_t w_t r_t kl_t - entropy_coef sum_t w_t entropy_t
"""

import torch
from torch import Tensor

from ..batch.checks import check_constant, check_floats, check_name, check_number, check_tensor
from ..batch.layout import Layout
from ..errors import wrong
from ..objectives.policy import Objective, kl_estimator
from ..ops.dispatch import Regularizers

KL_RATIOS = ("token", "span_mean")
NO_REGULARIZERS = Regularizers(None, kl_estimator("kl_k3"), 0.0, None, None, 0.0, None)


def regularizers_of(
    layout: Layout,
    dtype: torch.dtype,
    *,
    ref_logp: Tensor | None,
    kl: str | Objective,
    kl_coef: float,
    kl_weight: Tensor | None,
    kl_ratio: str | None,
    entropy_coef: float,
    entropy_weight: Tensor | None,
) -> Regularizers:
    """Checked and flat."""
    if ref_logp is kl_weight is kl_ratio is entropy_weight is None and kl == "kl_k3":
        if type(kl_coef) is type(entropy_coef) is float and kl_coef == entropy_coef == 0:
            return NO_REGULARIZERS
    kl = kl_estimator(kl)
    check_number("kl_coef", kl_coef)
    check_number("entropy_coef", entropy_coef)
    if ref_logp is None and kl_coef != 0:
        raise wrong("ref_logp", None, f"one log-prob per token, {list(layout.shape)}; kl_coef is {kl_coef}")
    if ref_logp is not None:
        check_floats("ref_logp", ref_logp)
        check_constant("ref_logp", ref_logp)
        ref_logp = layout.flat_tokens("ref_logp", ref_logp, dtype)
    if kl_ratio is not None:
        check_name("kl_ratio", kl_ratio, KL_RATIOS)
    kl_weight, entropy_weight = (
        weight if weight is None else flat_weight(name, weight, layout, dtype)
        for name, weight in (("kl_weight", kl_weight), ("entropy_weight", entropy_weight))
    )
    return Regularizers(ref_logp, kl, float(kl_coef), kl_weight, kl_ratio, float(entropy_coef), entropy_weight)


def flat_weight(name: str, weight: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """A constant factor of each token's loss, [N]; for a padded batch [B, 1] is one per sequence."""
    check_tensor(name, weight)
    check_constant(name, weight)
    if layout.width is not None and weight.shape == (layout.num_sequences, 1):
        weight = weight.expand(layout.shape)
    return layout.flat_tokens(name, weight, dtype)

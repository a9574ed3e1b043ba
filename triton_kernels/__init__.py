"""Triton backend: defines torch.ops.tokenrl_triton with the schemas of tokenrl/ops/kernel_ops.py and
divergence_ops.py.

Registered for CUDA, and for CPU tensors where Triton interprets (TRITON_INTERPRET=1).
"""

import torch

from ..ops import divergence_ops, kernel_ops
from .aggregation_weights import aggregation_weights
from .divergence import divergence
from .divergence_backward import divergence_backward
from .objective import objective
from .position_adaptive_clip import position_adaptive_clip
from .statistic import statistic, statistic_backward
from .token_logprobs import token_logprobs
from .token_logprobs_backward import token_logprobs_backward, token_logprobs_backward_

OPS = {
    op.__name__: op
    for op in (
        objective, statistic, statistic_backward, position_adaptive_clip, aggregation_weights, token_logprobs,
        token_logprobs_backward, token_logprobs_backward_, divergence, divergence_backward,
    )
}  # fmt: skip
_library = torch.library.Library("tokenrl_triton", "DEF")
for _name, _schema in (kernel_ops.SCHEMAS | divergence_ops.SCHEMAS).items():
    _library.define(_name + _schema)
for _name, _op in OPS.items():
    for _key in ("CUDA", "CPU"):
        _library.impl(_name, _op, _key)

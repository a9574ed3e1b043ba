"""TRL 1.10 to 1.16. One line: `from tokenrl.integrations.trl import GRPOTrainer` in place of TRL's."""

from ..hosts import require

require("trl")

from .head import patch_trl_head, unpatch_trl_head  # noqa: E402
from .names import patch_trl, unpatch_trl  # noqa: E402
from .trainer import GRPOTrainer, TokenRLConfig, TokenRLMixin  # noqa: E402

__all__ = [
    "GRPOTrainer", "TokenRLConfig", "TokenRLMixin", "patch_trl", "patch_trl_head", "unpatch_trl", "unpatch_trl_head",
]  # fmt: skip

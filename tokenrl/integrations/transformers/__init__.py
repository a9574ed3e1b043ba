"""transformers 4.50 to 5.24. One line: `fuse_lm_head(model)`, and the model called with labels makes no logits."""

from ..hosts import require

require("transformers")

from .head import fuse_lm_head, unfuse_lm_head  # noqa: E402

__all__ = ["fuse_lm_head", "unfuse_lm_head"]

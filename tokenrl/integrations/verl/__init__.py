"""verl 0.6.1 to 0.10. One setting: `actor_rollout_ref.actor.policy_loss.loss_mode=tokenrl_ctpo`.

verl loads this module in each of its processes: by the entry point verl.plugins (from 0.9.0 on), by
VERL_USE_EXTERNAL_MODULES=tokenrl.integrations.verl, or by model.external_lib. It imports nothing of verl while verl is
importing; TOKENRL_VERL says what else it does there (tokenrl/integrations/verl/settings.py).
"""

from .head import fuse, patch, unfuse, unpatch
from .registry import register, replace, restore
from .settings import install

__all__ = ["fuse", "patch", "register", "replace", "restore", "unfuse", "unpatch"]

install()

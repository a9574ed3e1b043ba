#!/usr/bin/env bash
# CTPO in NeMo-RL, from its checkout: the first two lines are of tokenrl, the rest is NeMo-RL's GRPO example. tokenrl must be in the
# environment of NeMo-RL's workers too. What else NeMo-RL takes goes on the command line.
set -euo pipefail

export TOKENRL_OBJECTIVE='{"ctpo": {"eps_low": 0.025, "eps_high": 0.05}}'

uv run python -m tokenrl.integrations.nemo_rl examples/run_grpo.py `# <- in place of python examples/run_grpo.py` \
    --config "${CONFIG:-examples/configs/grpo_math_1B.yaml}" \
    loss_fn.token_level_loss=false `# <- the method's own aggregation` \
    loss_fn.reference_policy_kl_penalty=0 \
    "$@"

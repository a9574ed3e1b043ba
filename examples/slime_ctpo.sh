#!/usr/bin/env bash
# CTPO in slime, from its checkout: the variable and two arguments of tokenrl, marked below, on top of a GRPO run of slime's. RUN holds
# the arguments of that run (model, checkpoints, rollout, parallelism), as slime's own scripts have them.
set -euo pipefail

export TOKENRL_OBJECTIVE='{"ctpo": {"eps_low": 0.025, "eps_high": 0.05}}'  # <- the objective

ray job submit --address="${RAY:-http://127.0.0.1:8265}" \
    --runtime-env-json="$(python3 -c 'import json, os; name = "TOKENRL_OBJECTIVE"; print(json.dumps({"env_vars": {name: os.environ[name]}}))')" \
    -- python3 train.py \
    --loss-type custom_loss `# <-` \
    --custom-loss-function-path tokenrl.integrations.slime.loss `# <-` \
    --advantage-estimator grpo \
    $RUN "$@"

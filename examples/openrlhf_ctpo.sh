#!/usr/bin/env bash
# CTPO in OpenRLHF: the two lines of tokenrl are marked, the rest is a GRPO run of OpenRLHF's. DATA is a dataset of prompts,
# REWARD the script of OpenRLHF's that scores a completion. What else OpenRLHF takes goes on the command line:
# bash openrlhf_ctpo.sh --actor.num_gpus_per_node 8
set -euo pipefail

export TOKENRL_OBJECTIVE='{"ctpo": {"eps_low": 0.025, "eps_high": 0.05}}'  # <- the objective

python3 -m tokenrl.integrations.openrlhf `# <- in place of openrlhf.cli.train_ppo_ray` \
    --actor.model_name_or_path "${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}" \
    --data.prompt_dataset "$DATA" \
    --data.input_key prompt \
    --data.apply_chat_template \
    --reward.remote_url "$REWARD" \
    --actor.loss_agg_mode seq-mean-token-mean `# <- the method's own aggregation` \
    --algo.advantage.estimator group_norm \
    --rollout.n_samples_per_prompt 8 \
    "$@"

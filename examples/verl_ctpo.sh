#!/usr/bin/env bash
# CTPO in verl's GRPO recipe: two lines of yours, marked below. verl loads tokenrl by itself where both are installed; before
# 0.9.0 it does with VERL_USE_EXTERNAL_MODULES=tokenrl.integrations.verl. DATA holds verl's gsm8k
# (examples/data_preprocess/gsm8k.py of verl). Whatever else verl takes goes on the command line: bash verl_ctpo.sh trainer.n_gpus_per_node=8
set -euo pipefail

DATA=${DATA:-$HOME/data/gsm8k}
MODEL=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}

python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_files="$DATA/train.parquet" \
    data.val_files="$DATA/test.parquet" \
    data.train_batch_size=256 \
    data.max_prompt_length=512 \
    data.max_response_length=1024 \
    actor_rollout_ref.model.path="$MODEL" \
    actor_rollout_ref.actor.policy_loss.loss_mode=tokenrl_ctpo `# <- the objective` \
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean  `# <- the method's own aggregation` \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16 \
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=16 \
    trainer.n_gpus_per_node="${GPUS:-1}" \
    trainer.nnodes=1 \
    trainer.total_epochs=1 \
    "$@"

#!/usr/bin/env bash
# CTPO in SkyRL: two settings of tokenrl and the method's own reduction, marked below; the rest is a GRPO run of SkyRL's. DATA
# holds SkyRL's gsm8k (examples/train/gsm8k/gsm8k_dataset.py of SkyRL). What else SkyRL takes goes on the command line.
set -euo pipefail

DATA=${DATA:-$HOME/data/gsm8k}

python3 -m skyrl.train.entrypoints.main_base \
    trainer.override_entrypoint=tokenrl.integrations.skyrl `# <- ours goes before SkyRL's` \
    trainer.algorithm.policy_loss_type=tokenrl_ctpo        `# <- the objective` \
    trainer.algorithm.loss_reduction=sequence_mean         `# <- the method's own aggregation` \
    trainer.algorithm.advantage_estimator=grpo \
    trainer.algorithm.use_kl_loss=false \
    data.train_data="['$DATA/train.parquet']" \
    data.val_data="['$DATA/validation.parquet']" \
    trainer.policy.model.path="${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}" \
    generator.n_samples_per_prompt=8 \
    environment.env_class=gsm8k \
    "$@"

"""CTPO in ms-swift: a plugin.

swift rlhf --rlhf_type grpo --model Qwen/Qwen2.5-0.5B-Instruct --dataset AI-MO/NuminaMath-TIR --reward_funcs accuracy \\
    --loss_type grpo --num_generations 8 --external_plugins examples/swift_ctpo.py
"""

from tokenrl.integrations import swift

swift.use("ctpo", eps_low=0.025, eps_high=0.05)

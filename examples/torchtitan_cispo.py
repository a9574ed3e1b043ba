"""CISPO in torchtitan's RL experiment: its alphabet-sort configuration with the loss of tokenrl.

python -m torchtitan.experiments.rl.train --module torchtitan_cispo --config rl_cispo   # from examples/
"""

from tokenrl.integrations.torchtitan import PolicyLoss

LOSS = PolicyLoss.Config(objective="cispo", parameters={"eps_high": 4.0})


def rl_cispo():
    from torchtitan.components.loss import ChunkedLossWrapper
    from torchtitan.experiments.rl.examples.alphabet_sort.config_registry import rl_grpo_qwen3_0_6b_varlen

    config = rl_grpo_qwen3_0_6b_varlen()
    config.trainer.loss = ChunkedLossWrapper.Config(num_chunks=8, loss_fn=LOSS)
    return config

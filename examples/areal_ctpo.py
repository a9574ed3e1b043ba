"""CTPO in AReaL: two lines of tokenrl at the head of AReaL's GSM8K example, in every process that runs this script.

python examples/areal_ctpo.py --config CONFIG
"""

import sys

from tokenrl.integrations import areal as tokenrl_areal

tokenrl_areal.use("ctpo", eps_low=0.025, eps_high=0.05)

from areal import PPOTrainer  # noqa: E402
from areal.api.cli_args import GRPOConfig, load_expr_config  # noqa: E402
from areal.dataset import get_custom_dataset  # noqa: E402
from areal.utils.hf_utils import load_hf_tokenizer  # noqa: E402


def main(args: list[str]) -> None:
    config, _ = load_expr_config(args, GRPOConfig)
    tokenizer = load_hf_tokenizer(config.tokenizer_path)
    train = get_custom_dataset(split="train", dataset_config=config.train_dataset, tokenizer=tokenizer)
    with PPOTrainer(config, train_dataset=train) as trainer:
        trainer.train(workflow="areal.workflow.rlvr.RLVRWorkflow", workflow_kwargs={
            "reward_fn": "areal.reward.gsm8k.gsm8k_reward_fn", "gconfig": config.gconfig, "tokenizer": tokenizer,
        })  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])

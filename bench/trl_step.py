"""The loss step of TRL's GRPOTrainer, forward and backward of a micro-batch: TRL's own, and tokenrl's.

Both are the real trainer on the same model and batch, in one process and in turns.
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch

from .measure import peak_memory

TURNS = 3
VOCAB, WIDTH, ROWS, PROMPT, TOKENS = 151936, 256, 8, 8, 128


def _trainer(kind: type, model: Any, **own: Any) -> Any:
    from .trl_world import configured

    made = configured(kind, model=model, max_completion_length=TOKENS, num_iterations=1, **own)
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made


def _batch(share: float) -> dict[str, torch.Tensor]:
    """share: of the completion's tokens that the mask keeps."""
    g = torch.Generator().manual_seed(0)
    mask = (torch.arange(TOKENS) < int(share * TOKENS)).long().expand(ROWS, -1)
    return {
        "prompt_ids": torch.randint(3, VOCAB, (ROWS, PROMPT), generator=g),
        "prompt_mask": torch.ones(ROWS, PROMPT, dtype=torch.int64),
        "completion_ids": torch.randint(3, VOCAB, (ROWS, TOKENS), generator=g),
        "completion_mask": mask,
        "advantages": torch.randn(ROWS, generator=g),
        "num_items_in_batch": mask.sum(),
    }


def _step(trainer: Any, batch: dict[str, torch.Tensor]) -> Callable[[], object]:
    parameters = list(trainer.model.parameters())

    def call() -> object:
        return torch.autograd.grad(trainer._compute_loss(trainer.model, batch), parameters)

    return call


def measure() -> list[dict[str, Any]]:
    """A row of the table each: what, seconds and peak bytes of TRL's step and of ours."""
    import trl

    from tokenrl.integrations.trl import GRPOTrainer, TokenRLConfig

    from .trl_world import made_model

    found = []
    for share in (1.0, 0.5):
        batch = _batch(share)
        kinds = {"TRL": (trl.GRPOTrainer, {})} | {
            f"tokenrl, {head}": (GRPOTrainer, {"tokenrl": TokenRLConfig(head=head)}) for head in ("hidden", "one-pass")
        }
        calls = {
            name: _step(_trainer(kind, made_model(vocab_size=VOCAB, hidden_size=WIDTH), **own), batch)
            for name, (kind, own) in kinds.items()
        }
        for call in calls.values():
            call()  # warm; the first of ours also runs TRL's loss
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(TURNS):
            for name, call in calls.items():
                begin = perf_counter()
                call()
                times[name].append(perf_counter() - begin)
        for name, call in calls.items():
            found.append(
                {
                    "what": f"{name}, {share:.0%} of {ROWS} x {TOKENS} tokens", "seconds": median(times[name]),
                    "bytes": peak_memory(call, "cpu"),
                }
            )  # fmt: skip
    return found

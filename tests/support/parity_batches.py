"""Rollout batches that the instruments are tried on."""

import torch

import tokenrl
from tokenrl.instruments.rollout_batch import save


def long(objective="ctpo", rows=3, width=4096, seed=1):
    """Log-probs alone, of long sequences with holes, each token as far from the old policy as in training."""
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(rows, width, generator=g) * 3
    mask = (torch.arange(width) < torch.tensor([[width], [width - 7], [width // 3]])) & (
        torch.rand(rows, width, generator=g) > 0.2
    )
    old = logp - torch.randn(rows, width, generator=g) * 0.02
    tensors = {"logp": logp, "old_logp": old, "mask": mask, "advantages": torch.tensor([0.7, -1.2, 0.4])}
    return tokenrl.RolloutBatch(tensors, tokenrl.objective(objective), {}, {})


def packed(objective="grpo", head="hidden"):
    """The sequences of random_batch one after another, the last one empty."""
    batch = tokenrl.parity.random_batch(2, objective, head=head, kl_coef=0.05)
    lengths = torch.tensor([24, 20, 13, 24, 17, 24, 9, 0])
    cells = torch.arange(24) < lengths[:, None]
    tensors = {name: x[cells] if x.shape[:2] == cells.shape else x for name, x in batch.tensors.items()}
    tensors["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return tokenrl.RolloutBatch(tensors, batch.objective, batch.settings, {})


def empty():
    """No token takes part."""
    batch = tokenrl.parity.random_batch(3)
    return tokenrl.RolloutBatch(
        batch.tensors | {"mask": torch.zeros(8, 24, dtype=torch.bool)}, batch.objective, batch.settings, {}
    )


def demo_like():
    """As the demo records: ids are -100 in masked cells, log-probs come along, ctpo."""
    batch = tokenrl.parity.random_batch(4, "ctpo", temperature=1.0)
    ids = torch.where(batch.tensors["mask"], batch.tensors["ids"], -100)
    return tokenrl.RolloutBatch(
        batch.tensors | {"ids": ids, "logp": batch.log_probs("reference")}, batch.objective, batch.settings, {}
    )


BATCHES = {"demo-like": demo_like, "long": long, "packed": packed, "empty": empty}


def saved(name, folder):
    path = folder / f"{name}.safetensors"
    save(BATCHES[name](), path)
    return path

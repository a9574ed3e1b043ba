"""Batches for preference_loss."""

import torch

import tokenrl

P, T = 3, 7


def batch(name, seed=0, dtype=torch.float64):
    """What the row wants, halves chosen and rejected; rows of the mask with holes and at least one token."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64).to(dtype)

    mask = torch.rand(2 * P, T, generator=g) > 0.3
    mask[:, 2] = True
    row, case = tokenrl.PREFERENCES[name], {"mask": mask, "logp": -2 * random(2 * P, T)}
    if row.reference == "given":
        case["ref_logp"] = -2 * random(2 * P, T)
    if row.divergence:
        case["divergence"] = random(2 * P, T)
    if row.coupling == "labels":
        case["desirable"] = torch.tensor([True, False, True, True, False, False])
        if row.link.compared:
            case[row.link.compared] = random(5) - 0.3
    return case

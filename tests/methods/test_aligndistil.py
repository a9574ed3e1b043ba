"""The combined head of AlignDistil against the teacher's logits written out; those against the authors' code stand in
tests/golden."""

import pytest
import torch

import tokenrl
from tokenrl.methods import aligndistil


@pytest.mark.parametrize("variant", aligndistil.VARIANTS)
def test_the_combination_of_two_heads_is_a_head(variant):
    g = torch.Generator().manual_seed(0)
    hidden, dpo, other = (torch.randn(2, 5, d, generator=g, dtype=torch.float64) for d in (4, 6, 3))
    weight, dpo_weight, other_weight = (torch.randn(17, d, generator=g, dtype=torch.float64) for d in (4, 6, 3))
    mask = torch.rand(2, 5, generator=g) > 0.3
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    how = {"beta": 0.2, "beta2": 3.0, "mask": mask}
    teacher, coef = aligndistil.teacher_of(variant, dpo @ dpo_weight.T, other @ other_weight.T, **how)
    *head, found_coef = aligndistil.linear_teacher_of(variant, dpo, dpo_weight, other, other_weight, **how)
    torch.testing.assert_close((head[0] @ head[1].T)[mask], teacher[mask])
    torch.testing.assert_close(found_coef[mask], coef[mask])
    row = tokenrl.distillation("reverse_kd", aggregation="seq-mean-token-mean")
    expected, _ = tokenrl.distillation_loss(row, hidden @ weight.T, teacher, mask=mask, token_weight=coef)
    found, _ = tokenrl.linear_distillation_loss(row, *leaves, *head, mask=mask, token_weight=found_coef)
    torch.testing.assert_close(found, expected)
    for got, truth in zip(*(torch.autograd.grad(x, leaves) for x in (found, expected)), strict=True):
        torch.testing.assert_close(got, truth)


def test_a_variant_by_its_name():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="variant.*theorem1"):
        aligndistil.linear_teacher_of("theorem", x, x, x, x)

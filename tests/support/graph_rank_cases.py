"""Cases of fronts of two heads on ranks under torch.compile: one graph each, of the same bits."""

import torch
from preference_rank_cases import given
from vocab_cases import sizes_of
from vocab_divergence_cases import own_columns, states

import tokenrl
from tokenrl.distributed import VocabShard


def compare(losses, leaves):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    found = [f(*leaves) for f in (losses, torch.compile(losses, fullgraph=True, backend="aot_eager"))]
    torch.testing.assert_close(*found, rtol=0, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(sum(x), leaves) for x in found), rtol=1e-13, atol=1e-13)


def divergences_one_graph(group):
    sizes = sizes_of("unequal", group.size())
    (hidden, *head), (other, *other_head, _), row_mask = states(sizes)
    at, how = own_columns(group, sizes), {"backend": "cpu", "vocab": VocabShard(group, sizes)}
    other_weight = other_head[0][at].clone()

    def losses(hidden, weight, bias):
        by_token = tokenrl.token_divergence(hidden @ weight.t(), other @ other_weight.t(), "jsd", **how)
        pair = hidden, weight, other, other_weight
        from_states = tokenrl.linear_token_divergence(*pair, "forward_kl", bias=bias, row_mask=row_mask, **how)
        loss, _ = tokenrl.linear_distillation_loss("kd", *pair, bias=bias, mask=row_mask, **how)
        return by_token.sum(), from_states.sum(), loss

    compare(losses, [hidden.nan_to_num(), *(x[at] for x in head)])


def preference_one_graph(group):
    sizes = sizes_of("unequal", group.size())
    case = given("simpo", sizes)
    at, ids, how = own_columns(group, sizes), case.pop("ids"), {"backend": "cpu", "vocab": VocabShard(group, sizes)}
    hidden, weight, bias = (case.pop(key) for key in ("hidden", "weight", "bias"))

    def loss(hidden, weight, bias):
        return tokenrl.linear_preference_loss("simpo", hidden, weight, ids, bias=bias, **case, **how)[:1]

    compare(loss, [hidden.nan_to_num(), weight[at], bias[at]])


CASES = {case.__name__: case for case in (divergences_one_graph, preference_one_graph)}

"""X-Token's P-KL and H-KL token by token, what is never read, errors (outputs of NeMo-RL: tests/golden)."""

import math

import pytest
import torch

from tokenrl.methods import xtoken

N, M, V, W, C = 5, 4, 6, 7, 3
SPANS, OTHER = torch.tensor([0, 0, -1, 1, 2]), torch.tensor([0, 1, 1, -1])
IDS = torch.tensor([[0, 1], [2, -1], [3, -1], [3, -1], [5, 4], [0, 6]])
WEIGHTS = torch.tensor([[0.7, 0.3], [1, 0], [1, 0], [1, 0], [0.55, 0.45], [0.9, 0.1]], dtype=torch.float64)


def models(seed=0):
    g = torch.Generator().manual_seed(seed)
    logits, other = (torch.randn(*s, generator=g, dtype=torch.float64) * 2 for s in ((N, V), (M, W)))
    logits[2] = torch.nan
    return logits.requires_grad_(), other


@pytest.mark.parametrize("kind", xtoken.KINDS)
def test_p_kl_in_a_loop(kind):
    logits, other = models()
    projection = xtoken.sparse_projection(IDS, WEIGHTS, W)
    values, valid = xtoken.p_kl(logits, other, SPANS, OTHER, C, projection, most=4, kind=kind, temperature=2.0)
    assert valid.tolist() == [True, True, False] and values[2] == 0
    columns = sorted(range(W), key=lambda v: -other[:, v].max().item())[:4]
    for c in range(2):
        q = dict.fromkeys(columns, 0.0)
        for n in (SPANS == c).nonzero().flatten().tolist():
            p = (logits[n].detach() / 2).softmax(-1)
            for v, i in (IDS >= 0).nonzero().tolist():
                if IDS[v, i].item() in q:
                    q[IDS[v, i].item()] += (p[v] * WEIGHTS[v, i]).item()
        rows = [(other[m, columns] / 2).log_softmax(-1) for m in (OTHER == c).nonzero().flatten()]
        t = (sum(rows) / len(rows)).tolist()
        pairs = [(math.log(q[v] / sum(q.values())), log_t) for v, log_t in zip(columns, t, strict=True)]
        forward = sum(math.exp(y) * (y - x) for x, y in pairs)
        reverse = sum(math.exp(x) * (x - y) for x, y in pairs)
        wanted = 4 * (forward if kind == "forward_kl" else reverse)
        assert values[c].item() == pytest.approx(wanted, rel=1e-7), c


@pytest.mark.parametrize("kind", xtoken.KINDS)
def test_h_kl_in_a_loop(kind):
    logits, other = models()
    pair = xtoken.matched_ids(IDS, WEIGHTS, W)
    assert [x.tolist() for x in pair] == [[1, 2, 5], [2, 3, 0]]  # 3 and 0 lose their ids to 2 and 5; 4 is below 0.6
    assert [x.tolist() for x in xtoken.matched_ids(IDS, WEIGHTS, W, match="strict")] == [[1, 2], [2, 3]]
    values, _ = xtoken.h_kl(logits, other, SPANS, OTHER, C, *pair, most=2, kind=kind)
    for c in range(2):
        p, r = (
            sum(x[n].detach().log_softmax(-1) for n in (s == c).nonzero().flatten()) / (s == c).sum()
            for x, s in ((logits, SPANS), (other, OTHER))
        )
        wanted = 0.0
        for v, w in zip(*(x.tolist() for x in pair), strict=True):
            a, b = (r[w], p[v]) if kind == "forward_kl" else (p[v], r[w])
            wanted += (a.exp() * (a - b)).item()
        rests = [sorted(x[[v for v in range(len(x)) if v not in at]].exp().tolist(), reverse=True)[:2]
                 for x, at in ((p, pair[0].tolist()), (r, pair[1].tolist()))]  # fmt: skip
        wanted += sum(abs(x - y) for x, y in zip(*rests, strict=True))
        assert values[c].item() == pytest.approx(wanted, rel=1e-9), c


def test_gradients():
    """By finite differences, to the student's rows that have a span with tokens of both; the others get zeros."""
    logits, other = models()
    projection, pair = xtoken.sparse_projection(IDS, WEIGHTS, W), xtoken.matched_ids(IDS, WEIGHTS, W)

    def both(z):
        values = xtoken.p_kl(z, other, SPANS, OTHER, C, projection, temperature=1.5)[0]
        return values + xtoken.h_kl(z, other, SPANS, OTHER, C, *pair)[0]

    (grad,) = torch.autograd.grad(both(logits).sum(), logits)
    assert not grad[[2, 4]].any() and grad[[0, 1, 3]].any(-1).all()
    clean = logits.detach().nan_to_num().requires_grad_()
    assert torch.autograd.gradcheck(both, clean)


LOGITS, OTHER_LOGITS = models()
PROJECTION = xtoken.sparse_projection(IDS, WEIGHTS, W)
GIVEN = {"logits": LOGITS, "other_logits": OTHER_LOGITS, "spans": SPANS, "other_spans": OTHER, "number": C}
ERRORS = {
    "kind": ({"kind": "jsd"}, "kind: got 'jsd', accepted: forward_kl, reverse_kl"),
    "dense": (
        {"projection": PROJECTION.to_dense()},
        r"projection: got torch.strided \[6, 7\], accepted: a sparse tensor",
    ),
    "rows": ({"projection": PROJECTION.t()}, r"projection: got torch.sparse_coo \[7, 6\], accepted: a sparse tensor"),
    "spans": ({"other_spans": SPANS}, r"other_spans: got \[5\] from -1 to 2, accepted: \[4\] from -1 to 2"),
    "logits": ({"other_logits": SPANS}, r"other_logits: got a torch.Tensor of torch.int64 \[5\], accepted: bf16"),
    "temperature": ({"temperature": 0}, "temperature: got 0, accepted: a positive finite number"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    given, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        xtoken.p_kl(**GIVEN | {"projection": PROJECTION} | given)


def test_errors_of_the_projection():
    with pytest.raises(ValueError, match="^match: got 'exact', accepted: strict, relaxed"):
        xtoken.matched_ids(IDS, WEIGHTS, W, match="exact")
    with pytest.raises(ValueError, match=r"^ids: got \[6, 2\] from -1 to 6, accepted: \[V, k\] from -1 to 5"):
        xtoken.sparse_projection(IDS, WEIGHTS, 6)
    with pytest.raises(ValueError, match=r"^weights: got torch.float64 \[5, 2\], accepted: floats \[6, 2\]"):
        xtoken.sparse_projection(IDS, WEIGHTS[1:], W)

"""token_logprobs on every backend under its options, on rows that are hard, and with ties."""

import pytest
import torch
from cases import kernel_backends
from logit_cases import DTYPES, check, make, run

from tokenrl.logprobs.from_logits import OUTPUTS

EVERY_KERNEL = pytest.mark.parametrize("backend", kernel_backends())
# The interpreter multiplies -inf by 0 before it selects, and subtracts inf from itself.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def zeros(found, rows):
    """Every output and the gradient are 0, False where the output is a bool, in these rows."""
    return all(x[rows].count_nonzero() == 0 for x in found.values())


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap,logit_scale", [(None, 0.25), (None, 3.0), (30.0, 1.0), (2.0, 0.5), (5.0, 2.0)])
def test_softcap_and_logit_scale(softcap, logit_scale, dtype, backend):
    check(*make(3, 201, dtype=dtype), backend, softcap=softcap, logit_scale=logit_scale, temperature=0.8)


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape,k", [((4,), None), ((2, 2), 3)])
def test_a_temperature_per_row(shape, k, precision, dtype, backend):
    temperature = torch.linspace(0.3, 2.0, 4, dtype=precision).view(shape)
    check(*make(*shape, 201, dtype=dtype, k=k), backend, temperature=temperature, softcap=20.0)


@EVERY_KERNEL
def test_equal_temperatures_are_one_number(backend):
    logits, ids = make(3, 201)
    one = run(logits, ids, backend, temperature=0.5)
    each = run(logits, ids, backend, temperature=torch.full((3,), 0.5))
    assert all(torch.equal(one[name], x) for name, x in each.items())


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3,), (2, 2)])
@pytest.mark.parametrize("per_row", [False, True])
def test_a_keep_mask(per_row, shape, dtype, backend):
    """One for all rows or one per logit; what is left out gets no gradient."""
    logits, ids = make(*shape, 301, dtype=dtype)
    keep = torch.rand(logits.shape if per_row else (301,), generator=torch.Generator().manual_seed(1)) > 0.4
    keep[..., 0] = True
    ids = torch.where(keep.expand(logits.shape).gather(-1, ids[..., None])[..., 0], ids, 0)
    found = check(logits, ids, backend, keep_mask=keep, softcap=25.0)
    assert found["gradient"][~keep.expand(logits.shape)].count_nonzero() == 0


@EVERY_KERNEL
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_keep_mask_is_minus_infinity_where_it_is_false(softcap, backend):
    """The same outputs, but for the mean, which counts what is kept."""
    logits, ids = make(3, 301)
    keep = torch.arange(301) % 3 != 1
    ids = ids // 3 * 3
    options = {"outputs": tuple(name for name in OUTPUTS if name != "mean_logit"), "softcap": softcap}
    masked = run(logits, ids, backend, keep_mask=keep, **options)
    infinite = check(logits.masked_fill(~keep, -torch.inf), ids, backend, **options)
    for name, x in masked.items():
        torch.testing.assert_close(x, infinite[name], rtol=1e-5, atol=1e-6, msg=name)


@EVERY_KERNEL
@pytest.mark.parametrize("softcap", [None, 10.0])
def test_an_id_that_is_not_kept(softcap, backend):
    """Its log-prob is -inf; the gradients are those of the logits that are kept, and finite."""
    logits, ids = make(2, 65)
    keep = torch.ones(2, 65, dtype=torch.bool).scatter(1, ids[:, None], False)
    found = check(logits, ids, backend, keep_mask=keep, softcap=softcap)
    assert (found["logp"] == -torch.inf).all() and not found["is_top1"].any()
    assert found["gradient"].isfinite().all() and found["gradient"].gather(1, ids[:, None]).count_nonzero() == 0


@EVERY_KERNEL
@pytest.mark.parametrize("softcap", [None, 10.0])
def test_an_id_of_minus_infinity(softcap, backend):
    """Its own gradient is not defined; every other is, and all are finite."""
    logits, ids = make(2, 33)
    logits.scatter_(1, ids[:, None], -torch.inf)
    truth, base, found = (
        run(x, ids, b, softcap=softcap)
        for x, b in ((logits.double(), "reference"), (logits, "reference"), (logits, backend))
    )
    assert (found["logp"] == -torch.inf).all() and found["gradient"].isfinite().all()
    others = torch.ones(2, 33, dtype=torch.bool).scatter(1, ids[:, None], False)
    torch.testing.assert_close(found["gradient"][others].double(), truth["gradient"][others], rtol=1e-5, atol=1e-5)
    check(logits, ids, backend, softcap=softcap, pulled=())


@pytest.mark.parametrize("vocab", [5, 40000])
@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
def test_a_logit_of_plus_infinity(backend, vocab):
    """It leaves no distribution: NaN for its row alone, in values and gradient; under a softcap it is a number."""
    logits, ids = torch.zeros(2, vocab), torch.tensor([1, 1])
    logits[0, 3] = torch.inf
    found = run(logits, ids, backend)
    for name in ("logp", "entropy", "lse", "max_prob", "log_sum_sq_probs", "gradient"):
        assert found[name][0].isnan().all() and not found[name][1].isnan().any(), name
    values = run(logits, ids, backend, softcap=30.0)
    assert not any(values[name].isnan().any() for name in ("logp", "entropy", "lse", "gradient"))


@EVERY_KERNEL
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_rows_that_a_row_mask_leaves_out_are_never_read(shape, k, backend):
    logits, ids = make(*shape, 301, k=k)
    row_mask = torch.tensor([True, False, True, False]).view(shape)
    logits[~row_mask] = torch.nan
    temperature = torch.where(row_mask, 0.7, 1.0)
    keep = torch.rand(logits.shape, generator=torch.Generator().manual_seed(2)) > 0.2
    keep.scatter_(-1, ids.view(*shape, -1), True)
    keep[~row_mask] = False
    assert zeros(check(logits, ids, backend, row_mask=row_mask), ~row_mask)
    found = check(logits, ids, backend, row_mask=row_mask, temperature=temperature, softcap=9.0, keep_mask=keep)
    assert zeros(found, ~row_mask)


@EVERY_KERNEL
@pytest.mark.parametrize("ignore_index", [-100, 0, -1, 17])
def test_the_ignored_id(ignore_index, backend):
    """It may be one of the vocabulary's; rows with it are never read, and -100 then means nothing else."""
    logits, ids = make(4, 301)
    ids[:] = torch.tensor([5, ignore_index, 300, ignore_index])
    logits[1] = torch.nan
    assert zeros(check(logits, ids, backend, ignore_index=ignore_index), [1, 3])


@EVERY_KERNEL
def test_a_batch_whose_rows_are_all_ignored(backend):
    logits, ids = make(3, 301)
    found = run(logits * torch.nan, torch.full_like(ids, -100), backend)
    assert zeros(found, slice(None))


def hard_rows(hard, vocab=1501):
    logits, ids = make(4, vocab, seed=1)
    if hard == "masked":
        logits[:, 5:900] = -torch.inf
        ids[:] = 1000
    elif hard == "first blocks masked":
        logits[:, :1490] = -torch.inf
        ids[:] = 1495
    elif hard == "last blocks masked":
        logits[:, 9:] = -torch.inf
        ids[:] = 3
    elif hard == "one finite":
        keep = logits.gather(1, ids[:, None])
        logits = torch.full_like(logits, -torch.inf).scatter(1, ids[:, None], keep)
    elif hard.startswith("offset"):
        logits += float(hard.split()[1])
    elif hard == "lowest first":
        logits[:, :1200] = torch.finfo(torch.float32).min
        ids[:] = 1300
    elif hard == "rising":
        logits = logits.sort(1).values
    elif hard == "peaked":
        logits.scatter_(1, ids[:, None], 200.0)
    return logits, ids


HARD = ["masked", "first blocks masked", "last blocks masked", "one finite", "offset 1e4", "offset -1e4"]
HARD += ["lowest first", "rising", "peaked"]


@EVERY_KERNEL
@pytest.mark.parametrize("hard", HARD)
def test_hard_rows(hard, backend):
    # Two fp32 numbers near 1e38 do not add up: the mean of such rows overflows in the reference, too.
    outputs = tuple(name for name in OUTPUTS if hard != "lowest first" or name != "mean_logit")
    check(*hard_rows(hard), backend, outputs=outputs)


@EVERY_KERNEL
@pytest.mark.parametrize("pulled", [("logp",), ("logp", "entropy")], ids=" ".join)
@pytest.mark.parametrize("hard", [*HARD, "offset 7e5", "offset -7e5", "offset 8e5", "offset 1e7"])
def test_hard_rows_of_which_nothing_more_is_asked(hard, pulled, backend):
    """The kernels that know log-probs, lse and the entropy alone, as far as powers of two are made by one fma and
    beyond; in rows long enough for the loop that takes several loads at once."""
    check(*hard_rows(hard, 5003), backend, outputs=("logp", "entropy", "lse"), pulled=pulled)


@EVERY_KERNEL
@pytest.mark.parametrize("hard", ["masked", "first blocks masked", "one finite", "offset 1e4", "peaked"])
def test_hard_rows_under_a_softcap(hard, backend):
    """-inf stays out, which the softcap would bring back as -softcap."""
    logits, ids = hard_rows(hard)
    found = check(logits, ids, backend, softcap=50.0)
    assert found["gradient"][logits == -torch.inf].count_nonzero() == 0


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties(dtype, backend):
    """The first of equal maxima is top 1; ids equal to it share its rank."""
    logits = torch.zeros(5, 701, dtype=dtype)
    logits[0, [100, 400, 650]] = 3
    logits[1, 600:] = 2
    logits[1, 5] = 4
    ids = torch.tensor([[100, 400, 650, 0], [5, 600, 700, 4], [0, 1, 700, 350], [0, 1, 2, 3], [0, 700, 1, 2]])
    logits[3, 1:] = -torch.inf
    logits[4, 700] = 1
    found = check(logits, ids, backend)
    assert found["is_top1"].int().tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]
    assert found["rank"].tolist() == [[1, 1, 1, 4], [1, 2, 2, 103], [1, 1, 1, 1], [1, 2, 2, 2], [2, 1, 2, 2]]


@EVERY_KERNEL
def test_the_order_is_that_of_the_logits(backend):
    """A softcap that makes large logits equal in fp32 does not tie them."""
    logits = torch.full((1, 65), 1000.0)
    logits[0, 40] = 1001.0
    found = check(logits, torch.tensor([[40, 3]]), backend, softcap=1.0, pulled=())
    assert found["rank"].tolist() == [[1, 2]] and found["is_top1"].tolist() == [[True, False]]


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_at_once(dtype, backend):
    """All options on a strided view with several ids per row."""
    whole, ids = make(2, 4, 300, dtype=dtype, k=3)
    view, ids = whole[:, :-1, 20:270], ids[:, :-1] % 250
    row_mask = torch.tensor([[True, True, False], [True, False, True]])
    keep = torch.rand(250, generator=torch.Generator().manual_seed(3)) > 0.3
    keep[ids.flatten()] = True
    ids[0, 0, 1] = 7
    found = check(
        view, ids, backend, temperature=torch.linspace(0.5, 1.5, 6).view(2, 3), softcap=15.0, logit_scale=1.5,
        keep_mask=keep, row_mask=row_mask, ignore_index=7,
    )  # fmt: skip
    assert zeros(found, ~row_mask) and set(found) == {*OUTPUTS, "gradient"}


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
@pytest.mark.parametrize("softcap", [None, 10.0])
def test_a_row_of_minus_infinity_alone(softcap, backend):
    """It has no distribution: its log-prob and its gradient are NaN everywhere; the other rows are as without it."""
    logits, ids = make(3, 33)
    alone = run(logits[1:], ids[1:], backend, softcap=softcap)
    found = run(torch.cat([torch.full_like(logits[:1], -torch.inf), logits[1:]]), ids, backend, softcap=softcap)
    assert found["logp"][0].isnan() and found["gradient"][0].isnan().all() and alone["gradient"].any()
    assert (found["lse"][0] == -torch.inf).all()
    for name in ("logp", "entropy", "lse"):
        torch.testing.assert_close(found[name][1:], alone[name])
    assert found["gradient"][1:].isfinite().all()

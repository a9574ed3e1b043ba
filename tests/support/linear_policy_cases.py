"""Random batches with a head, and linear_policy_loss on a backend against the reference and against its own parts."""

import cases
import torch
from cases import device_of
from torch.profiler import ProfilerActivity, profile

import tokenrl
from tokenrl.instruments.parity import close
from tokenrl.objectives.gates.kl import KlGate
from tokenrl.objectives.metrics import EXTREMES, RAW
from tokenrl.ops.linear.gemm import sum_dtype
from tokenrl.ops.linear.head import BYTES_PER_TILE

HEAD = ("hidden", "weight", "bias")
TRANSFORM = ("temperature", "softcap", "logit_scale", "keep_mask")
RESULTS = ("loss", *RAW, "kl", "entropy")
# One number may be exact in the base by chance: what is summed over the same tokens is compared together.
TOGETHER = {
    "loss": ("loss", "kl", "entropy"),
    "sums": tuple(name for name in RAW if name not in EXTREMES),
    "range": ("ratio_min", "ratio_max"),
} | {name: (name,) for name in HEAD}
TORCHS = (*HEAD, "loss", "kl", "entropy")  # GEMMs of torch, and its sums over tokens
KL_ROWS = [name for name, row in tokenrl.OBJECTIVES.items() if isinstance(row.gate, KlGate)]
OF_COVARIANCE = ("clip_cov", "kl_cov")  # clip_cov also draws
# A log-prob from 16-bit logits errs by about 0.02.
STEPS = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}


def make(seed=0, rows=6, width=9, dim=8, vocab=50, spread=1.0, poison=True, exact=False, **how) -> dict:
    """A batch of cases.py with a head, in numbers that bf16 holds; old_logp and ref_logp lie around its own.

    exact: in small whole numbers, whose logits have the same bits in whatever order they are summed.
    logp is that of the head under `how`. Masked tokens hold NaN and inf; one valid token is ignored by its id."""
    g = torch.Generator().manual_seed(seed)
    case = cases.batch(seed, rows, width, poison=False)
    head = (torch.randn(*shape, generator=g) for shape in ((rows, width, dim), (vocab, dim), (vocab,)))
    hidden, weight, bias = (x.round().clamp(-2, 2).double() if exact else x.bfloat16().double() for x in head)
    ids = torch.randint(0, vocab, (rows, width), generator=g)
    if "keep_mask" in how:
        ids = how["keep_mask"].expand(rows, width, vocab).double().argmax(-1)
    stats = tokenrl.linear_token_logprobs(hidden, weight, ids, bias=bias, backend="reference", **how)
    rounded = (stats.logp * 4096).round() / 4096
    moves = (case["logp"] - case["old_logp"]) * spread
    case |= {"logp": stats.logp, "old_logp": rounded - moves, "ref_logp": rounded + moves.flip(1)}
    case["advantages"][1] = 0.75
    left_out = ~case["mask"]
    left_out[0, 1] = True
    ids[0, 1] = -100
    if poison:
        hidden[left_out], case["old_logp"][left_out], case["ref_logp"][left_out] = torch.nan, torch.inf, torch.nan
    return case | {"hidden": hidden, "weight": weight, "bias": bias, "ids": ids} | how


def packed(case: dict) -> dict:
    """The same batch packed."""
    rest = {name: x for name, x in case.items() if name in ("weight", "bias")}
    keep = case.get("keep_mask")
    if keep is not None and keep.dim() == 1:
        rest["keep_mask"] = keep
    lengths = torch.where(case["mask"], torch.arange(1, case["mask"].shape[1] + 1), 0).amax(1)
    cells = torch.arange(case["mask"].shape[1]) < lengths[:, None]
    tokens = {name: x for name, x in case.items() if name not in rest}
    flat = {k: x[cells] if isinstance(x, torch.Tensor) and x.dim() > 1 else x for k, x in tokens.items()}
    return flat | rest | {"cu_seqlens": torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])}


def without(case: dict, *names: str) -> dict:
    return {name: x for name, x in case.items() if name not in names}


def valid(case: dict) -> torch.Tensor:
    used = case["ids"] != case.get("ignore_index", -100)
    return used & case["mask"] if "mask" in case else used


def settled(objective, made=make, dtype=torch.float64, **more) -> dict:
    """The first case of made(seed) on which an error of the log-probs in that dtype changes no clip decision."""
    for seed in range(2000):
        case = made(seed)
        tokens = without(case, *HEAD, *TRANSFORM, "ids", "ref_logp", "ignore_index") | {"mask": valid(case)}
        moved = [tokens | {"logp": case["logp"] + step} for step in (-STEPS[dtype], STEPS[dtype])]
        if objective in OF_COVARIANCE:  # which an equal step of all tokens does not move
            signs = torch.arange(case["logp"].numel()).view_as(case["logp"]) % 2 * 2 - 1
            moved += [tokens | {"logp": case["logp"] + by * STEPS[dtype] * signs} for by in (-1, 1)]
        first, *others = (decisions(objective, tokens, **more) for tokens in moved)
        if all(torch.equal(first, other) for other in others):
            return case
    raise AssertionError("no seed is away from every edge")


def decisions(objective, tokens: dict, **more) -> torch.Tensor:
    """How many tokens each bound clips, or which tokens a covariance leaves out."""
    rest = without(tokens, "logp", "old_logp", "advantages")
    logp = tokens["logp"].clone().requires_grad_()
    torch.manual_seed(0)
    loss, metrics = tokenrl.policy_loss(
        objective, logp, tokens["old_logp"], tokens["advantages"], backend="reference", **rest, **more
    )
    return torch.autograd.grad(loss, logp)[0].sign() if objective in OF_COVARIANCE else metrics.raw[4:7]


def placed(case: dict, backend: str, dtype: torch.dtype) -> dict:
    """The arguments on the backend's device, the head in dtype and the rest in that of its sums."""

    def place(name, x):
        if not isinstance(x, torch.Tensor):
            return x
        to = dtype if name in HEAD else sum_dtype(dtype)
        return x.detach().to(device_of(backend), to if x.is_floating_point() else None, copy=True)

    return {name: place(name, x) for name, x in case.items() if name != "logp"}


def leaves(given: dict, frozen=()) -> dict:
    """The tensors of the head that want gradients, by name."""
    return {name: given[name].requires_grad_() for name in HEAD if given.get(name) is not None and name not in frozen}


def called(objective, given: dict, backend: str):
    order = ("hidden", "weight", "ids", "old_logp", "advantages")
    rest = without(given, *order)
    return tokenrl.linear_policy_loss(objective, *(given[name] for name in order), backend=backend, **rest)


def run(objective, case: dict, backend: str, dtype: torch.dtype, frozen=(), scale=1.0, **more) -> dict:
    """Loss, metrics, passes, left_out and the gradients of the head's tensors, by name. scale: upstream gradient."""
    given = placed(case | more, backend, dtype)
    wanted = leaves(given, frozen)
    torch.manual_seed(0)
    loss, metrics = called(objective, given, backend)
    grads = torch.autograd.grad(loss * scale, wanted.values())
    values = [loss.detach(), *metrics.raw.to(loss.dtype)]  # sums of numbers of that precision
    found = dict(zip((*RESULTS, "passes", "left_out"), values, strict=True)) | dict(zip(wanted, grads, strict=True))
    return {name: x.cpu() for name, x in found.items()}


def check(objective, case: dict, backend: str, dtype: torch.dtype, **more) -> dict:
    """Loss, metrics and gradients against the fp64 reference, by the one tolerance rule. Returns the kernel's."""
    exact = without(more, "compute_dtype")
    truth, base = (
        run(objective, case, "reference", torch.float64, **exact),
        run(objective, case, "reference", dtype, **more),
    )
    kernel = run(objective, case, backend, dtype, **more)
    same(kernel, truth, base, backend)
    assert kernel["left_out"] == truth["left_out"]
    return kernel


def same(kernel: dict, truth: dict, base: dict, backend: str) -> None:
    """By the one tolerance rule; nothing is finer than fp64, where the reference errs as much as a kernel."""
    for what, names in TOGETHER.items():
        names = [name for name in names if name in truth]
        if not names:
            continue
        values = [torch.stack([x[name] for name in names]).squeeze(0) for x in (kernel, truth, base)]
        assert values[0].dtype == values[2].dtype, what
        if values[2].dtype == torch.float64:
            torch.testing.assert_close(*values[:2], rtol=1e-12, atol=1e-14, msg=lambda text, of=what: f"{of}: {text}")
        else:
            close(*values, what=f"{backend} {what}")


def composed(
    objective, case: dict, dtype: torch.dtype, kl="kl_k3", kl_coef=0.0, entropy_coef=0.0, aggregation=None, **more
) -> dict:  # fmt: skip
    """The same from linear_token_logprobs, policy_loss and group_aggregate, on the reference backend."""
    given = placed(case | more, "reference", dtype)
    wanted = leaves(given)
    aggregation = aggregation or tokenrl.objective(objective).aggregation
    mask = valid(given)
    how = {name: given[name] for name in (*TRANSFORM, "ignore_index", "bias") if name in given}
    stats = tokenrl.linear_token_logprobs(
        given["hidden"], given["weight"], given["ids"], row_mask=mask, backend="reference", **how
    )
    layout = {name: given[name] for name in ("cu_seqlens", "group_ids", "normalizer") if name in given}
    layout |= {"mask": mask, "aggregation": aggregation, "backend": "reference"}
    weights, advantages = given.get("token_weight"), given["advantages"]
    each = layout | {"token_weight": weights}
    loss, metrics = tokenrl.policy_loss(
        objective, stats.logp, given["old_logp"], advantages, segment_ids=given.get("segment_ids"), **each
    )
    divergence, _ = tokenrl.policy_loss(kl, stats.logp, given["ref_logp"], advantages, **each)
    values = stats.entropy if weights is None else stats.entropy * weights
    bonus = tokenrl.group_aggregate(values, advantages=advantages, **layout)
    loss = loss + kl_coef * divergence - entropy_coef * bonus
    grads = torch.autograd.grad(loss, wanted.values())
    values = [loss.detach(), *metrics.raw.to(loss.dtype), divergence.detach(), bonus.detach()]
    return dict(zip(RESULTS, values, strict=True)) | dict(zip(wanted, grads, strict=True))


def check_parts(objective, case: dict, backend: str, kl="kl_k3", names=None, memory_budget=None, **more) -> dict:
    """A backend's results, or those named, against those of the parts, by the one tolerance rule. Returns them."""
    truth, base = (composed(objective, case, dtype, kl, **more) for dtype in (torch.float64, torch.float32))
    kernel = run(objective, case, backend, torch.float32, kl=kl, memory_budget=memory_budget, **more)
    same(kernel, {name: truth[name] for name in names or truth}, base, backend)
    return kernel


def budget_of(case: dict, rows: int, dtype: torch.dtype = torch.float32) -> int:
    """The memory_budget that holds a chunk of so many tokens."""
    vocab, dim = case["weight"].shape
    per_row = "keep_mask" in case and case["keep_mask"].dim() > 1
    return rows * (vocab * (dtype.itemsize + per_row) + dim * dtype.itemsize + BYTES_PER_TILE)


def gemms(call):
    """(what the call returns, the shapes of both factors of each GEMM, in order)."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        found = call()
    first = {"aten::mm": 0, "aten::addmm": 1}
    events = [(event.input_shapes, first[event.name]) for event in profiled.events() if event.name in first]
    return found, [tuple(map(tuple, shapes[at : at + 2])) for shapes, at in events]

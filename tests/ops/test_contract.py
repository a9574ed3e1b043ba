"""The op contract: schemas, opcheck, gradcheck, torch.compile, double backward."""

import functools
from collections.abc import Callable

import pytest
import torch
from cases import backends_to_test, batch, device_of, interpreted, kernel_backends, run

import tokenrl
from tokenrl.logprobs.from_logits import OUTPUTS
from tokenrl.ops import backends, divergence_ops, kernel_ops, linear_divergence_ops, linear_ops, preference_ops

KERNELS = kernel_backends()
OPS = (kernel_ops, linear_ops, divergence_ops, linear_divergence_ops, preference_ops)
SCHEMAS = {name: text for ops in OPS for name, text in ops.SCHEMAS.items()}


def size(backend) -> tuple[int, int]:
    """Rows and tokens of each: opcheck calls an op a dozen times, and the interpreter pays for each of its tokens."""
    return (2, 3) if interpreted(backend) else (3, 6)


def arguments(backend) -> dict[str, tuple]:
    """Arguments for each op on a small padded batch with a hole."""
    g, device, (rows, width) = torch.Generator().manual_seed(0), device_of(backend), size(backend)
    logp, old = (torch.randn(rows * width, generator=g).to(device) for _ in range(2))
    mask = torch.ones(rows * width, dtype=torch.bool, device=device)
    mask[3] = False
    cu = torch.arange(rows + 1, device=device) * width
    weight, one = (
        torch.full((rows,), 0.5, dtype=torch.float64, device=device),
        torch.ones((), dtype=torch.float64, device=device),
    )
    logits = torch.randn(rows, width, 11, generator=g).to(device)
    ids = torch.randint(0, 11, (rows, width), generator=g).to(device)
    ids = torch.stack([ids, ids.flip(0)], -1)
    keep = (torch.rand(11, generator=g) > 0.2).to(device).expand(rows, width, 11)
    stats = [torch.rand(rows, width, generator=g).to(device) for _ in range(8)]
    transform = (1.0, stats[7] + 0.5, 5.0, 0.9, keep)
    backward = (torch.stack(stats[:2], -1), *stats[:3], logits, ids, *stats[3:7], *transform)
    bounds = torch.rand(rows * width, generator=g).to(device)
    objective = (logp, old, logp[:rows].clone(), mask, cu, None, weight, one, None)
    return {
        "objective": (
            *objective,
            "prefix_sum",
            "through",
            "ppo_clip",
            [0.2, 0.0, 3.0],
            [None, bounds, None],
            20.0,
            10.0,
        ),
        "statistic": (logp, old, mask, cu, None, "prefix_mean", "through"),
        "statistic_backward": (logp, mask, cu, None, "prefix_mean", "through"),
        "position_adaptive_clip": (logp, mask, cu, [0.1, 0.2, 0.5], [None, None, None]),
        "aggregation_weights": (
            mask,
            cu,
            rows * width,
            logp[:rows].clone(),
            torch.tensor([4, 4, 1], device=device)[:rows],
            "balanced",
            "groups",
            0.7,
        ),
        "token_logprobs": (logits, ids, *transform, list(OUTPUTS), False),
        "token_logprobs_backward": backward,
        "token_logprobs_backward_": backward,
    }


NOTHING = (None, "nothing")  # no main_grad; what the forward keeps for the backward


def saved(op: str, hidden, weight, bias, ids, *head) -> tuple:
    """What the backward of the head keeps of its forward."""
    _, entropy, lse, lse_rest, squares, *_ = op(hidden, weight, bias, ids, *head, ["log_sum_sq_probs"], *NOTHING)
    return lse, lse_rest, entropy, squares


def linear_arguments(backend) -> dict[str, Callable[[], tuple]]:
    """Arguments of the ops from hidden states by the op's name and, after a space, what is special about them.

    Every differentiable output is asked for: opcheck pulls them all."""
    g, device, (rows, width) = torch.Generator().manual_seed(1), device_of(backend), size(backend)
    tokens = rows * width
    tensors = tuple(torch.randn(*shape, generator=g).to(device) for shape in ((tokens, 4), (11, 4), (11,)))
    ids = torch.randint(0, 11, (tokens, 1), generator=g).to(device)
    ids[3] = -100
    logp, old, reference, temperatures, *upstream = (torch.rand(tokens, generator=g).to(device) for _ in range(8))
    head = (1.0, temperatures + 0.5, 5.0, 0.9, (torch.arange(11) != 5).to(device)[None], "float32", 1 << 20)
    main_grad, mask = torch.ones_like(tensors[1]), (ids != -100).flatten()
    cu = torch.arange(rows + 1, device=device) * width
    spans = (torch.full((rows,), 0.5, device=device).double(), torch.ones((), device=device).double())
    ops = backends.BACKENDS[backend].ops

    def after():
        return upstream[0][:, None], *upstream[1:4], *saved(ops.linear_token_logprobs, *tensors, ids, *head), None

    loss = (
        old, logp, mask, cu, None, *spans, None, "prefix_sum", "local", "ppo_clip", [0.2, 0.0, 3.0],
        [None, logp, None], 20.0, 10.0, reference, "kl_k3", [10.0], 20.0, 9.0, 0.1, old, "token", 0.01, None,
    )  # fmt: skip
    every, across = [True] * 3, (tensors[0], tensors[1].t().contiguous().t(), tensors[2])
    return {
        "linear_token_logprobs": lambda: (*tensors, ids, *head, ["log_sum_sq_probs", "rank"], *NOTHING),
        "linear_token_logprobs without bias": lambda: (*tensors[:2], None, ids, *head, ["log_sum_sq_probs"], *NOTHING),
        "linear_token_logprobs keeps logits": lambda: (*tensors, ids, *head, ["log_sum_sq_probs"], None, "logits"),
        "linear_token_logprobs keeps directions": lambda: (*tensors, ids, *head, [], None, "directions"),
        "linear_token_logprobs turned": lambda: (*across, ids, *head, ["log_sum_sq_probs"], *NOTHING),
        "linear_token_logprobs_backward": lambda: (*tensors, ids, *head, *after(), every, None),
        "linear_token_logprobs_backward frozen": lambda: (*tensors, ids, *head, *after(), [False, True, False], None),
        "linear_token_logprobs_backward main_grad": lambda: (*tensors, ids, *head, *after(), every, main_grad),
        "linear_token_logprobs_backward turned": lambda: (*across, ids, *head, *after(), every, None),
        "linear_policy_loss": lambda: (*tensors, ids, *head, every, None, *loss),
        "linear_policy_loss frozen": lambda: (*tensors, ids, *head, [True, False, False], None, *loss),
        "linear_policy_loss main_grad": lambda: (*tensors, ids, *head, every, main_grad, *loss),
        "linear_policy_loss turned": lambda: (*across, ids, *head, every, None, *loss),
    }


# What is special is written once for all kernels: it is tried on the first.
LINEAR = [
    (case, backend)
    for backend in KERNELS
    for case in linear_arguments(backend)
    if backend == KERNELS[0] or case in linear_ops.SCHEMAS
]


@pytest.mark.parametrize("case,backend", LINEAR)
def test_opcheck_from_hidden_states(case, backend):
    """Where main_grad is given, the op alone: a traced derivative may not write to it."""
    op, values = case.split()[0], linear_arguments(backend)[case]()
    if not op.endswith("_backward") and not case.endswith("main_grad"):
        wanted = [True, *(not case.endswith("directions"),) * 2] if op == "linear_token_logprobs" else values[11]
        tensors = (x if x is None else x.clone().requires_grad_(w) for x, w in zip(values[:3], wanted, strict=False))
        values = (*tensors, *values[3:])
    torch.library.opcheck(getattr(backends.BACKENDS[backend].ops, op).default, values)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("op", kernel_ops.SCHEMAS)
def test_opcheck(op, backend):
    found = getattr(backends.BACKENDS[backend].ops, op).default
    values = arguments(backend)[op]
    if op in ("objective", "position_adaptive_clip", "token_logprobs"):
        values = (values[0].clone().requires_grad_(), *values[1:])
    torch.library.opcheck(found, values)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("op", SCHEMAS)
def test_every_backend_has_the_schema_of_the_contract(op, backend):
    found = getattr(backends.BACKENDS[backend].ops, op).default._schema
    assert str(found).split("(", 1)[1] == SCHEMAS[op].split("(", 1)[1].replace("->  ", "-> ")


@pytest.mark.parametrize("backend", backends_to_test())
def test_gradcheck(backend):
    device = device_of(backend)
    # The backward of the reference is torch's, which promises no bits.
    gradcheck = functools.partial(torch.autograd.gradcheck, nondet_tol=1e-12 if backend == "reference" else 0.0)
    small = interpreted(backend)  # two calls for every entry of the inputs
    rows, width = (2, 3) if small else (3, 5)
    case = {k: v.to(device) for k, v in batch(3, rows=rows, width=width, poison=False).items()}
    logp, old = case["logp"].requires_grad_(), case["old_logp"]

    def loss(name, **more):
        return lambda x: tokenrl.policy_loss(
            name, x, old, case["advantages"], mask=case["mask"], backend=backend, **more
        )[0]

    through = tokenrl.objective("gspo", eps_low=0.9, eps_high=9.0)
    for objective in ("sapo", "kl_k3", through, tokenrl.objective(through, statistic="prefix_sum", cap=9.0)):
        assert gradcheck(loss(objective), logp)
    assert gradcheck(lambda x: tokenrl.group_aggregate(x, "token-mean", mask=case["mask"], backend=backend), logp)
    for kind in ("sum", "mean"):
        assert gradcheck(
            lambda x, kind=kind: tokenrl.prefix_ratio(
                x, old, mask=case["mask"], kind=kind, flow="through", backend=backend
            ),
            logp,
        )
    clip = dict(mask=case["mask"], eps_low=0.3, eps_high=0.2, power=0.5, backend=backend)
    assert gradcheck(lambda x: tokenrl.position_adaptive_clip(x, **clip), (logp - old).detach().requires_grad_())
    last = 3 if small else 8
    logits = torch.randn(4, last + 1, dtype=torch.float64, device=device, requires_grad=True)
    ids = torch.tensor([[0, last], [last, last], [-100, -100], [3, -100]], device=device)
    keep = torch.arange(last + 1, device=device) != last // 2 + 1
    outputs = ("logp", "entropy", "lse", "log_sum_sq_probs")
    for options in ({}, {"softcap": 3.0, "logit_scale": 0.8, "keep_mask": keep}):
        options |= {"temperature": 0.7, "outputs": outputs, "backend": backend}
        assert gradcheck(lambda z, options=options: tuple(tokenrl.token_logprobs(z, ids, **options)), logits)


def head(logits, ids, old_logp, advantages, mask, backend):
    logp, entropy = tokenrl.token_logprobs(logits, ids, temperature=0.9, backend=backend)
    loss, metrics = tokenrl.policy_loss("ctpo", logp, old_logp, advantages, mask=mask, backend=backend)
    return loss - 0.01 * tokenrl.group_aggregate(entropy, "token-mean", mask=mask, backend=backend), metrics.raw


@pytest.mark.parametrize("name", [name for name, row in tokenrl.OBJECTIVES.items() if row.form is not None])
def test_forms_compile_into_one_graph(name):
    case = batch(3, rows=4, width=6, poison=False)
    case = {key: x for key, x in case.items() if key not in ("segment_ids", "token_weight")}

    def loss(logp, old_logp, advantages, mask, group_ids):
        return tokenrl.policy_loss(name, logp, old_logp, advantages, mask=mask, group_ids=group_ids)[0]

    logp = case.pop("logp").requires_grad_()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        value = function(logp, **case)
        results.append((value, torch.autograd.grad(value, logp)[0]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", backends_to_test())
def test_compiles_into_one_graph(backend):
    device = device_of(backend)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    for rows in (3, 4):
        case = {k: v.to(device) for k, v in batch(rows, rows=rows, width=6, poison=False).items()}
        g = torch.Generator().manual_seed(0)
        logits = torch.randn(rows, 6, 13, generator=g).to(device).requires_grad_()
        ids = torch.randint(0, 13, (rows, 6), generator=g).to(device)
        rest = (ids, case["old_logp"].float(), case["advantages"].float(), case["mask"], backend)
        (eager, raw), (traced, traced_raw) = head(logits, *rest), compiled(logits, *rest)
        torch.testing.assert_close(eager, traced)
        torch.testing.assert_close(raw, traced_raw)
        expected, found = (torch.autograd.grad(loss, logits)[0] for loss in (eager, traced))
        torch.testing.assert_close(expected, found)


@pytest.mark.parametrize("backend", KERNELS)
def test_double_backward_raises(backend):
    logp = torch.zeros(2, 3, device=device_of(backend), requires_grad=True)
    x = torch.ones(2, device=logp.device)
    hidden, ids = logp.clone(), torch.tensor([0, 1], device=x.device)
    weight, head = torch.ones(4, 3, device=x.device), {"cu_seqlens": ids.new_tensor([0, 1, 2]), "backend": backend}
    parts = {
        "policy_loss": tokenrl.policy_loss("ppo", logp, None, x, backend=backend)[0],
        "prefix_ratio": tokenrl.prefix_ratio(logp, logp.detach(), backend=backend).sum(),
        "token_logprobs": tokenrl.token_logprobs(
            logp, torch.tensor([0, 1], device=x.device), backend=backend
        ).logp.sum(),
        "linear_token_logprobs": tokenrl.linear_token_logprobs(hidden, weight, ids, backend=backend).logp.sum(),
        "linear_policy_loss": tokenrl.linear_policy_loss("ppo", hidden, weight, ids, None, x, **head)[0],
    }
    for value in parts.values():
        (grad,) = torch.autograd.grad(value * 2, logp, create_graph=True)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(grad.sum(), logp)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_strided_upstream_gradient_is_honoured(backend):
    logits = torch.randn(3, 5, dtype=torch.float64, device=device_of(backend), requires_grad=True)
    ids = torch.tensor([1, 2, 3], device=logits.device)
    grads = [
        torch.autograd.grad(tokenrl.token_logprobs(logits, ids, backend=name).logp.sum(), logits)[0]
        for name in (backend, "reference")
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", KERNELS)
def test_the_backward_is_one_multiplication_of_the_saved_coefficient(backend):
    case = {k: v for k, v in batch(2).items() if k not in ("segment_ids", "group_ids", "token_weight")}
    _, grad, _ = run("ctpo", case, backend, torch.float32)
    device = device_of(backend)
    logp = case["logp"].float().to(device).requires_grad_()
    rest = {
        k: v.to(device, torch.float32) if v.is_floating_point() else v.to(device)
        for k, v in case.items()
        if k != "logp"
    }
    loss, _ = tokenrl.policy_loss(
        "ctpo", logp, rest["old_logp"], rest["advantages"], mask=rest["mask"], backend=backend
    )
    torch.testing.assert_close(torch.autograd.grad(loss, logp, torch.tensor(3.0, device=device))[0].cpu(), 3 * grad)

"""One case from hidden states: every backend checked on few rows, then timed in turns with bare GEMMs and rivals."""

import functools

import torch

from tokenrl import parity

from .check import largest, ratio
from .competitors import first_line
from .head_rivals import head_rivals
from .heads import BareGemms, HeadCase
from .measure import paired_medians, peak_memory
from .run import Findings

BARE = "bare GEMMs"


def head_truth(case: HeadCase) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Values and gradients of the reference in fp64, and in the case's precision."""
    found = []
    for dtype in (torch.float64, case.hidden.dtype):
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in (case.hidden, case.weight)]
        values = case.ours("reference", *leaves)
        flow = [c.to(x.dtype).view(x.shape) for c, x in zip(case.cotangents, values, strict=True)]
        found.append((*(x.detach() for x in values), *torch.autograd.grad(values, leaves, flow)))
    return found[0], found[1]


def head_errors(case: HeadCase, call, truth) -> tuple[str | None, float | None, float | None]:
    """(why the results are wrong or None, L2 error over the reference's: of the values, of the gradients)."""
    found, ratios, reason = case.thunk(call, True)(), [], None
    for number, (one, exact, base) in enumerate(zip(found, *truth, strict=True)):
        try:
            if one.dim():
                parity.close(one, exact, base, f"result {number}")
            else:
                close_loss(one, exact, base, case.old_logp)
        except AssertionError as error:
            reason = reason or " ".join(str(error).split())[:200]
        ratios.append(ratio(*(torch.linalg.vector_norm(x.double() - exact).item() for x in (one, base))))
    return reason, largest(ratios[:-2]), largest(ratios[-2:])


def close_loss(loss: torch.Tensor, exact: torch.Tensor, base: torch.Tensor, logp: torch.Tensor) -> None:
    """The rule for one number, with a floor of a few ulps of the log-probs: it inherits their rounding, whatever its
    own size, and the reference's error in one number may be nothing by luck."""
    error, allowed = (loss - exact).abs(), 2 * (base - exact).abs()
    allowed = allowed + 4 * torch.finfo(loss.dtype).eps * logp.abs().max()
    assert error <= allowed, f"loss: error {error:.3e}, allowed {allowed:.3e}"


def run_head(
    case: HeadCase, names: list[str], device: str, findings: Findings, *, repeats, compile, check_only
) -> None:
    """Checks the backends on a case and, unless that is all that is asked, measures those that are right."""
    small = case.checked or case
    truth = head_truth(small)
    errors = {}
    for name in names:
        try:
            reason, *found = head_errors(small, functools.partial(small.ours, name), truth)
        except Exception as error:  # a backend that raises is reported like one that is wrong, and the others still run
            reason = first_line(error)
        if reason:
            findings.failures.append(f"{case.name} {name}: {reason}")
        else:
            findings.passed.append(f"{case.name} {name}")
            errors[name] = found
    if not check_only and errors:
        findings.heads += measure_head(case, errors, device, findings, repeats=repeats, compile=compile)


def measure_head(case: HeadCase, errors: dict, device: str, findings: Findings, *, repeats, compile) -> list[dict]:
    """One line per backend and rival, and one of the bare GEMMs."""
    calls = {name: functools.partial(case.ours, name) for name in errors}
    for rival in head_rivals(case, compile):
        try:
            if rival.call is not None:
                case.thunk(rival.call, True)()
                calls[rival.name] = rival.call
                continue
            reason = rival.reason
        except Exception as error:  # whatever stops somebody else's code is the reason
            reason = first_line(error)
        findings.missing.append({"case": case.name, "competitor": rival.name, "reason": reason})
    bare = BareGemms(case)
    bare.both()
    timed = []
    for backward, gemm in ((False, bare.forward), (True, bare.both)):
        thunks = {BARE: gemm} | {name: case.thunk(call, backward) for name, call in calls.items()}
        timed.append(paired_medians(thunks, device, repeats, fewest=1))
    del bare
    peaks = {name: [peak_memory(case.thunk(call, b), device) for b in (False, True)] for name, call in calls.items()}
    return [head_line(case, name, timed, errors.get(name), peaks.get(name)) for name in (BARE, *calls)]


def head_line(case: HeadCase, name: str, timed: list[dict], errors, peaks) -> dict:
    flops = 2 * case.shape[0] * case.shape[1] * case.shape[2]
    line = {
        "op": case.op, "variant": case.variant, "shape": list(case.shape), "dtype": case.dtype, "backend": name,
        "ours": errors is not None, "peak_bytes": peaks, "errors": errors,
    }  # fmt: skip
    for key, times, count in zip(("forward", "both"), timed, (1, case.gemms), strict=True):
        line[f"{key}_ms"] = 1e3 * times[name]
        line[f"{key}_gflops"] = count * flops / times[name] / 1e9
        line[f"{key}_over_gemms"] = times[name] / times[BARE]
    if errors is not None:
        rivals = [rival for rival in timed[0] if rival in ("eager", "TRL", "Liger")]
        line["versus"] = {rival: [times[rival] / times[name] for times in timed] for rival in rivals}
    return line

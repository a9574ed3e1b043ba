"""The rows of the table of policy objectives, as entries."""

import inspect

from ...objectives.aggregations import AGGREGATIONS
from ...objectives.forms.base import Form
from ...objectives.forms.fibration import FiberPoDomain
from ...objectives.gates.base import INF, Gate
from ...objectives.gates.kl import KlGate
from ...objectives.policy import OBJECTIVES, Objective
from ...objectives.statistics import STATISTICS
from ...ops.backends import BACKENDS, PACKAGED
from .entry import Entry, assigned, text_of

FLOWS = {
    "through": "the true derivative, through the statistic to every token of the ratio",
    "local": "stopped in all tokens but the own one: ds_t / dlogp_t = 1, no other",
}


def entries() -> list[Entry]:
    return [entry_of(row) for row in OBJECTIVES.values()]


def family_of(row: Objective) -> str:
    """By the tokens that a ratio is made of; of single tokens, by what happens to it."""
    if isinstance(row.gate, KlGate):
        return "kl"
    if row.statistic != "token":
        return "prefix" if row.statistic.startswith("prefix") else "sequence"
    if row.form is not None:
        return "form"
    return "weighted" if type(row.gate).__module__.endswith("weighted") else "clip"


def entry_of(row: Objective) -> Entry:
    form = "" if row.form is None else f"; in the form {type(row.form).__name__}"
    parts = {
        f"{title} {part.name if isinstance(part, Gate) else type(part).__name__}": text_of(part, Gate, Form)
        for title, part in row.parts.items()
    }
    return Entry(
        table="policy", family=family_of(row), name=row.name,
        summary=f"{row.statistic:<17}  {row.flow:<7}  {row.gate.name}", rest=f"{row.aggregation}{form}",
        formula=formula(row), parts=parts, parameters=parameters(row),
        gradient=f"flow {row.flow!r}: {FLOWS[row.flow]}", source=row.source, certainty=row.certainty, feed=feed(row),
        example=example(row), backends=tuple(kernels(row)),
    )  # fmt: skip


def parameters(row: Objective) -> dict[str, object]:
    """Name -> value of the parameters of the row's parts, and of clamp and cap where they are not the usual ones."""
    found = {name: getattr(part, name) for part in row.parts.values() for name in part.names}
    if row.cap != INF:
        found["cap"] = row.cap
    if row.clamp != 20:
        found["clamp"] = row.clamp
    return found


def kernels(row: Objective) -> list[str]:
    """The backends whose kernels know the row's gate."""
    return [name for name in PACKAGED if BACKENDS[name].why_not_gate(row.gate.name) is None]


def formula(row: Objective) -> str:
    """The row from log ratio to loss, one step a line."""
    statistic = inspect.cleandoc(STATISTICS[row.statistic].__doc__ or "")
    clamped = "" if row.clamp == INF else f", clamped to +-{row.clamp:g}"
    capped = "" if row.cap == INF else f", at most {row.cap:g}"
    steps = [
        f"x_t = logp_t - old_logp_t{clamped}",
        f"{statistic.splitlines()[0].rstrip('.')}{capped}",
        f"l_t = {row.gate.name}(s_t, x_t, logp_t, A_t, t)",
        f"L = sum_t w_t l_t, w of {row.aggregation!r}",
    ]
    if row.form is not None:
        steps.insert(0, f"around it the form {type(row.form).__name__}, below")
    return "\n".join(steps)


def needs_groups(row: Objective) -> bool:
    return AGGREGATIONS[row.aggregation].by_group or isinstance(row.form, FiberPoDomain)


def feed(row: Objective) -> tuple[str, ...]:
    """What policy_loss is handed beside logp and mask."""
    if isinstance(row.gate, KlGate):
        found = ["old_logp: the reference model's log-probs; advantages: None"]
        return (*found, f"or, as a term of another objective, ref_logp= and kl={row.name!r} with kl_coef=")
    found = ["old_logp: the log-probs under which the tokens were sampled"]
    found.append("advantages: one per sequence, or one per token")
    if row.statistic.startswith("span"):
        found.append("segment_ids: where the ratio is one of segments, not of whole sequences")
    if needs_groups(row):
        found.append("group_ids: one number per sequence, rollouts of one prompt share it")
    found += [f"{name}: one value per token" for name, value in parameters(row).items() if value is None]
    return tuple(found)


def example(row: Objective) -> str:
    """A call with every parameter at the row's own value."""
    kl, groups = isinstance(row.gate, KlGate), ", group_ids=group_ids" if needs_groups(row) else ""
    batch = "ref_logp, None" if kl else "old_logp, advantages"
    return (
        f"row = tokenrl.objective({row.name!r}{assigned(parameters(row))})\n"
        f"loss, metrics = tokenrl.policy_loss(row, logp, {batch}, mask=mask{groups})\n"
        "loss.backward()\n"
        "print(loss.item(), metrics.clip_low, metrics.clip_high)"
    ).replace("'", '"')

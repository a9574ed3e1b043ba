"""The rows of the table of preference objectives, as entries."""

from ...objectives.links import Link, OfLabels, Score
from ...objectives.preference import COUPLINGS, DIVERGENCE_FLOWS, PREFERENCES, STATISTICS, Preference
from .entry import Entry, assigned, text_of


def entries() -> list[Entry]:
    return [entry_of(row) for row in PREFERENCES.values()]


def entry_of(row: Preference) -> Entry:
    parts = {f"link {type(row.link).__name__}": text_of(row.link, Link)}
    if type(row.score) is not Score:
        parts[f"score {type(row.score).__name__}"] = f"f(x) = {text_of(row.score, Score)}"
    return Entry(
        table="preference", family="preference", name=row.name,
        summary=f"{row.statistic:<17}  {type(row.link).__name__}",
        rest="log-probs alone" if row.reference == "none" else "log ratios to a reference", formula=formula(row),
        parts=parts, parameters=parameters(row), gradient=gradient(row), source=row.source, certainty=row.certainty,
        feed=feed(row), example=example(row), backends=(),
    )  # fmt: skip


def parameters(row: Preference) -> dict[str, object]:
    found = {name: getattr(part, name) for part in row.parts.values() for name in part.names}
    return found | {name: getattr(row, name) for name in ("divergence", "length", "nll") if getattr(row, name)}


def formula(row: Preference) -> str:
    """The row from log-probs to the loss, one step a line."""
    score = STATISTICS["sum"] + ("; divided by the number of tokens" if row.statistic == "mean" else "")
    steps = [score if row.reference == "given" else score.replace(" - ref_logp_t", "")]
    if type(row.score) is not Score:
        steps.append("f(x) in place of each score x, below")
    if row.divergence:
        steps.append("x + divergence sum_t v_t D_t in place of each x, v = divergence_weight")
    if row.length:
        steps.append("x + length |y| / beta in place of each x, |y| its number of tokens")
    steps.append(f"{COUPLINGS[row.coupling]}; L is the mean")
    if row.nll:
        steps.append("nll times the mean of -logp over nll_mask is added")
    return "\n".join(steps)


def gradient(row: Preference) -> str:
    tokens = f"dL / dlogp_t = w_t dL / dx of its sequence{', over its number of tokens' * (row.statistic == 'mean')}"
    return f"{tokens}; {DIVERGENCE_FLOWS[row.divergence_flow]}" if row.divergence else tokens


def feed(row: Preference) -> tuple[str, ...]:
    found = ["ref_logp: the reference model's log-probs"] if row.reference == "given" else ["no reference"]
    if isinstance(row.link, OfLabels):
        found.append("desirable: bool, one per sequence")
        if row.link.compared:
            found.append(f"{row.link.compared}: what a score is compared with")
    else:
        found.append("pairs: which sequences are chosen and rejected; None: the first half, the second half")
    if row.divergence:
        found.append("divergence: one per token, of tokenrl.token_divergence")
    if row.nll:
        found.append("nll_mask: the tokens of that mean; None: those of the chosen answers")
    return tuple(found)


def example(row: Preference) -> str:
    reference = ", ref_logp" if row.reference == "given" else ""
    given = ", desirable=desirable" if isinstance(row.link, OfLabels) else ""
    if isinstance(row.link, OfLabels) and row.link.compared:
        given += f", {row.link.compared}=torch.zeros(())"
    if row.divergence:
        given += ", divergence=divergence"
    call = f"loss, metrics = tokenrl.preference_loss(row, logp{reference}, mask=mask{given})"
    return (
        f"row = tokenrl.preference({row.name!r}{assigned(parameters(row))})\n{call}\n"
        "loss.backward()\nprint(loss.item(), metrics.margins)"
    ).replace("'", '"')

"""The rows of the table of unlearning objectives, as entries."""

from ...objectives.unlearning import COEFS, STATISTICS, UNLEARNINGS, Forget, Unlearning
from .entry import Entry, assigned, text_of


def entries() -> list[Entry]:
    return [entry_of(row) for row in UNLEARNINGS.values()]


def entry_of(row: Unlearning) -> Entry:
    values = {name: getattr(row.term, name) for name in row.term.names}
    values |= {name: getattr(row, name) for name in COEFS if getattr(row, name)}
    return Entry(
        table="unlearning", family="unlearning", name=row.name,
        summary=f"{row.statistic:<17}  {type(row.term).__name__}",
        rest="log-probs alone" if row.reference == "none" else "log ratios to a reference",
        formula=formula(row), parts={f"forget term {type(row.term).__name__}": text_of(row.term, Forget)},
        parameters=values, gradient="dL / dlogp_t, of the tokens to forget and of those to retain; divergence has one",
        source=row.source, certainty=row.certainty, feed=feed(row), example=example(row), backends=(),
    )  # fmt: skip


def formula(row: Unlearning) -> str:
    x = STATISTICS["sum"].replace("sum_t", "mean_t") if row.statistic == "mean" else STATISTICS[row.statistic]
    x = x if row.reference == "given" else x.replace(" - ref_logp_t", "").replace("(logp_t)", "logp_t")
    smoothing = " + smoothing L_s" if row.smoothing else ""
    terms = ["retain L_r"] * bool(row.retain) + [f"forget (alpha L_f{smoothing})"] + ["eos L_e"] * bool(row.eos)
    return f"{x}: L_f, of the term below\nL = {' + '.join(terms)}"


def feed(row: Unlearning) -> tuple[str, ...]:
    found = ["forget_mask: the tokens to forget"] + ["retain_mask: the tokens to keep"] * bool(row.retain)
    found += ["ref_logp: the log-probs before"] * (row.reference == "given")
    found += ["eos_mask: the ends of sequences among those to keep"] * bool(row.eos)
    found += ["divergence: of tokenrl.smoothing_kl"] * bool(row.smoothing)
    return tuple(found)


def example(row: Unlearning) -> str:
    masks = ["forget_mask=~mask"] + ["retain_mask=mask"] * bool(row.retain)
    masks += ["eos_mask=eos_mask"] * bool(row.eos) + ["divergence=divergence"] * bool(row.smoothing)
    reference = ", ref_logp" if row.reference == "given" else ""
    return (
        f"row = tokenrl.unlearning({row.name!r}{assigned(entry_values(row))})\n"
        f"loss, parts = tokenrl.unlearning_loss(row, logp{reference}, {', '.join(masks)})\n"
        "loss.backward()\nprint(loss.item())"
    ).replace("'", '"')


def entry_values(row: Unlearning) -> dict[str, object]:
    return {name: getattr(row.term, name) for name in row.term.names}

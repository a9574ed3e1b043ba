"""The rows of the tables of distillation objectives and of divergences, as entries."""

from ...objectives.distillation import DISTILLATIONS, Distillation
from ...objectives.divergences import DIVERGENCES, Divergence
from ...ops.backends import PACKAGED
from .entry import Entry, assigned, text_of

GRADIENT = "into the trained head's logits (hidden states, weight); the teacher gets one where it requires it"


def entries() -> list[Entry]:
    rows = [entry_of(row) for row in DISTILLATIONS.values()]
    return rows + [entry_of_divergence(kind()) for kind in DIVERGENCES.values()]


def entry_of(row: Distillation) -> Entry:
    values = {name: getattr(row.divergence, name) for name in row.divergence.names}
    power = f"T_t^{row.power:g} " if row.power else ""
    call = f"row = tokenrl.distillation({row.name!r}{assigned(values)})"
    return Entry(
        table="distillation", family="distillation", name=row.name, summary=row.divergence.name, rest=row.aggregation,
        formula=f"L = sum_t w_t {power}D(p_t, r_t), w of {row.aggregation!r}, p the student, r the teacher",
        parts={f"divergence {row.divergence.name}": text_of(row.divergence, Divergence)},
        parameters=values | ({"power": row.power} if row.power else {}), gradient=GRADIENT, source=row.source,
        certainty=row.certainty, backends=tuple(PACKAGED),
        feed=("logits of both, or hidden states and head of both (linear_distillation_loss)",
              "temperature: of both distributions"),
        example=(f"{call}\nloss, divergences = tokenrl.distillation_loss(row, logits, teacher_logits, mask=mask)\n"
                 "loss.backward()\nprint(loss.item(), divergences.shape)").replace("'", '"'),
    )  # fmt: skip


def entry_of_divergence(kind: Divergence) -> Entry:
    values = {name: getattr(kind, name) for name in kind.names}
    given = f"tokenrl.divergence({kind.name!r}{assigned(values)})" if values else repr(kind.name)
    return Entry(
        table="divergence", family="divergence", name=kind.name, summary=text_of(kind, Divergence).split("\n")[0],
        rest="per token, over the vocabulary", formula="D_t of p, the trained head, and r, another one",
        parts={f"divergence {kind.name}": text_of(kind, Divergence)}, parameters=values, gradient=GRADIENT,
        source=kind.source, certainty="", backends=tuple(PACKAGED),
        feed=("logits of both, or hidden states and head of both (linear_token_divergence)",),
        example=(f"divergence = tokenrl.token_divergence(logits, teacher_logits, {given}, row_mask=mask)\n"
                 "divergence.sum().backward()").replace("'", '"'),
    )  # fmt: skip

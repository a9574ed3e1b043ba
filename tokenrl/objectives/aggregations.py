"""THE table of aggregations: the weight w of each token in the loss, L = sum_t w_t l_t.

A mode is a row: w_t = span_weight / normaliser for the valid tokens of a sequence with n > 0 of them.

    span             span_weight                                              unit     normaliser counts
    one              1                                                        one      nothing: it is 1
    inverse_length   1 / n                                                    tokens   valid tokens
    group            1 / tokens of the group                                  rows     sequences with a valid token
    balanced         |own sign| / rows of the group / tokens of the own sign  groups   groups with a valid token
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Aggregation:
    """A mode: its span weight, what its normaliser counts, and whether it is also divided by the padded width T."""

    span: str
    unit: str
    over_width: bool = False

    @property
    def by_group(self) -> bool:
        return self.span in ("group", "balanced")


AGGREGATIONS = {
    "token-mean": Aggregation("one", "tokens"),
    "token-sum": Aggregation("one", "one"),
    "seq-mean-token-mean": Aggregation("inverse_length", "rows"),
    "seq-mean-token-sum": Aggregation("one", "rows"),
    "seq-mean-token-sum-norm": Aggregation("one", "rows", over_width=True),
    "group-mean": Aggregation("group", "groups"),
    "balanced": Aggregation("balanced", "groups"),
}

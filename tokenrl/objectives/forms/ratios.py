"""Forms that replace the log ratio (see base.py): GMPO, HMPO; and REAL, which compares sequences."""

import torch
from torch import Tensor

from ...errors import wrong
from ..gates.base import parametrised
from .base import Form, FormInputs


@parametrised
class Gmpo(Form):
    """x' = min(x, eps_high) where A >= 0, max(x, -eps_low) where A < 0; then the row's mean over the span, e^mean(x').

    Log space. The gradient goes through the mean to every token that is not clipped. clip_low, clip_high count the
    clipped tokens.

    Source: GMPO, arXiv 2507.20673 (authors' code); verl's geo_mean, TRL's GMPOTrainer (trainers).
    """

    replaces_ratio = True
    eps_low: float = 0.4
    eps_high: float = 0.4

    def _trimmed(self, tokens: FormInputs) -> tuple[Tensor, Tensor, Tensor]:
        """(x', whether it is clipped from below, from above)."""
        x, negative = tokens.x, tokens.advantages < 0
        low, high = negative & (x < -self.eps_low), ~negative & (x > self.eps_high)
        return torch.where(low, -self.eps_low, torch.where(high, self.eps_high, x)), low, high

    def evaluate(self, tokens: FormInputs) -> tuple[Tensor, Tensor]:
        x, low, high = self._trimmed(tokens)
        loss, raw = tokens.run(log_ratio=torch.where(tokens.valid, x, 0))
        return loss, tokens.counted(raw, low, high)


@parametrised
class Hmpo(Gmpo):
    """The same with the harmonic mean of the ratios, n / sum_t e^-x'_t.

    Source: GMPO (authors' code).
    """

    def evaluate(self, tokens: FormInputs) -> tuple[Tensor, Tensor]:
        x, low, high = self._trimmed(tokens)
        mean = tokens.statistic_of(torch.where(tokens.valid, torch.exp(-x), 0), "span_mean")
        loss, raw = tokens.run(log_ratio=-torch.where(tokens.valid, mean, 1).log())
        return loss, tokens.counted(raw, low, high)


@parametrised
class Real(Form):
    """Of each group log(1 + sum_pos e^(-s_i / tau)) + log(1 + sum_neg e^(s_i / tau)), s_i the row's mean log ratio.

    Rewards as labels, A > 0 against the rest; full gradient through the mean. A group without both kinds gives 0 and
    stays in the count that the loss is divided by. It needs group_ids, aggregates by "group-mean" alone and takes no
    weights: a row has no tokens to weigh.

    Source: REAL, arXiv 2602.05630, ms-swift (trainers).
    """

    tau: float = 0.5

    def evaluate(self, tokens: FormInputs) -> tuple[Tensor, Tensor]:
        layout, a = tokens.layout, tokens.per_row
        assert tokens.group_ids is not None
        if a is None:
            raise wrong("advantages", "one per token", f"one per sequence, [{layout.num_sequences}]")
        if tokens.aggregation != "group-mean":
            raise wrong("aggregation", repr(tokens.aggregation), "'group-mean', REAL's own")
        for name, given in (("token_weight", tokens.token_weight), ("segment_ids", tokens.starts)):
            if given is not None:
                raise wrong(name, "a tensor", "None; REAL compares whole sequences")
        if not layout.num_sequences:  # of nothing segment_reduce raises
            return tokens.run()
        counts = torch.segment_reduce(tokens.valid.to(tokens.x.dtype), "sum", lengths=layout.cu_seqlens.diff())
        s = torch.segment_reduce(tokens.x, "sum", lengths=layout.cu_seqlens.diff()) / counts.clamp(min=1)
        loss = self._groups(s, a > 0, counts > 0, tokens.group_ids).sum()
        # A batch without tokens has no count to divide by.
        loss = loss / torch.where(counts.any(), tokens.normalizer, 1).to(loss.dtype)
        with torch.no_grad():
            return loss.to(tokens.logp.dtype), tokens.run()[1]

    def _groups(self, s: Tensor, positive: Tensor, known: Tensor, group_ids: Tensor) -> Tensor:
        """[S]: of each known sequence an equal share of its group's loss, 0 of the others."""
        # A group's number is where its first sequence stands in order: no shape depends on how many there are.
        ordered, order = group_ids.sort(stable=True)
        group = torch.searchsorted(ordered, group_ids)
        lengths = torch.zeros_like(group).index_add(0, group, torch.ones_like(group))
        loss, sizes, both = torch.zeros_like(s), torch.zeros_like(s), known
        for members, sign in ((known & positive, -1), (known & ~positive, 1)):
            terms = torch.where(members, sign * s / self.tau, -torch.inf)
            loss = loss + _log1p_sum_exp(terms[order], lengths)[group]
            count = torch.segment_reduce(members[order].to(s.dtype), "sum", lengths=lengths)[group]
            sizes, both = sizes + count, both & (count > 0)
        return torch.where(both, loss / sizes.clamp(min=1), 0)


def _log1p_sum_exp(x: Tensor, lengths: Tensor) -> Tensor:
    """log(1 + sum e^x) of each of the segments of x."""
    with torch.no_grad():
        most = torch.segment_reduce(x, "max", lengths=lengths, initial=0.0)  # at least that of the 1
        most = torch.where(most == torch.inf, 0, most)
    terms = (x - most.repeat_interleave(lengths, output_size=x.numel())).exp()
    return most + torch.log((-most).exp() + torch.segment_reduce(terms, "sum", lengths=lengths))

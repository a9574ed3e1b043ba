"""What the fronts ask of a vocabulary that lies on several ranks, which a room above this one knows."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ..errors import described, wrong
from .token_stats import TokenStats


@runtime_checkable
class Vocabulary(Protocol):
    """What lies on several ranks: tokenrl.distributed.VocabShard."""

    @property
    def sequence_parallel(self) -> bool: ...
    def token_logprobs(self, logits: Tensor, ids: Tensor, **how: Any) -> TokenStats: ...
    def linear_token_logprobs(self, hidden: Tensor, weight: Tensor, ids: Tensor, **how: Any) -> TokenStats: ...
    def token_divergences(self, *call: Any) -> list[Tensor]: ...
    def agreement(self, what: str, like: Tensor, check: bool) -> AbstractContextManager[Any]: ...
    def head_arguments(self, *head: Any) -> Any: ...
    def rows_of(self, hidden: Tensor) -> tuple[int, ...]: ...
    def agree(self, agreed: Any, *call: Any) -> None: ...
    def ranks(self, like: Tensor, reduce_hidden_grad: bool, chosen: Any, head: Any) -> Any: ...
    def agree_on_preference(self, agreed: Any, *call: Any) -> None: ...
    def agree_on_divergence(self, agreed: Any, *call: Any) -> None: ...
    def linear_divergence(self, like: Tensor, reduce_hidden_grad: bool, *call: Any) -> tuple[Tensor, ...]: ...
    def linear_policy_loss(self, reduce_hidden_grad: bool, *call: Any) -> tuple[Tensor, ...]: ...


def agreement(vocab: Vocabulary | None, what: str, like: Tensor, check: bool) -> AbstractContextManager[Any]:
    """In which the arguments are checked: what one rank raises, all of them do."""
    if vocab is None:
        return nullcontext()
    refuse_beside_vocab(vocab)
    return vocab.agreement(what, like, check)


def refuse_beside_vocab(vocab: object, **options: Any) -> None:
    if not isinstance(vocab, Vocabulary):
        raise wrong("vocab", described(vocab), "a tokenrl.distributed.VocabShard")
    for name, option in options.items():
        if option is not None and option is not False:
            raise wrong(name, "one beside vocab", "none")

"""What the fronts ask of a vocabulary that lies on several ranks, which a room above this one knows."""

from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ..errors import described, wrong
from .token_stats import TokenStats


@runtime_checkable
class Vocabulary(Protocol):
    """What lies on several ranks: tokenrl.distributed.VocabShard."""

    def token_logprobs(self, logits: Tensor, ids: Tensor, **how: Any) -> TokenStats: ...
    def linear_token_logprobs(self, hidden: Tensor, weight: Tensor, ids: Tensor, **how: Any) -> TokenStats: ...
    def agreement(self, what: str, like: Tensor, check: bool) -> AbstractContextManager[Any]: ...
    def head_arguments(self, *head: Any) -> Any: ...
    def agree(self, agreed: Any, *call: Any) -> None: ...
    def linear_policy_loss(self, reduce_hidden_grad: bool, *call: Any) -> tuple[Tensor, ...]: ...


def refuse_beside_vocab(vocab: object, **options: Any) -> None:
    if not isinstance(vocab, Vocabulary):
        raise wrong("vocab", described(vocab), "a tokenrl.distributed.VocabShard")
    for name, option in options.items():
        if option is not None and option is not False:
            raise wrong(name, "one beside vocab", "none")

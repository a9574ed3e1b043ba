"""How many graphs torch.compile makes of a function."""

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func


def counted(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[Any]]:
    """(the function compiled whole, shapes and numbers open; the forward graphs it has made so far)."""
    graphs: list[Any] = []

    def forward(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=forward, bw_compiler=lambda graph, _: make_boxed_func(graph.forward))
    return torch.compile(function, dynamic=True, fullgraph=True, backend=backend), graphs

"""``torch.compile`` of a whole model in ``numerics("invariant")``: its layers are compiled, what is around them is not.

Around its layers a model reads documents on the host: which keys a row has, in which order a batch is computed, whose
labels count.  A trace cannot, so the forward of the model leaves it, and each layer is compiled as one graph.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from kernel_index.core import force

WHY = (
    "numerics('invariant') reads a batch's documents on the host: the model's layers are compiled, what is around them "
    "is not, and fullgraph=True is not possible; compile the layers by themselves for that"
)

COMPILER: ContextVar[Any] = ContextVar("kernel_index_compiler_of_layers", default=None)
"""What Dynamo compiles with, while a model that left its trace runs."""


def around_layers(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``forward(*args, **kwargs)`` as it is written, but for its layers."""
    eval_frame = torch._C._dynamo.eval_frame
    callback = eval_frame.set_eval_frame(None)
    token = COMPILER.set(callback)
    try:
        return forward(*args, **kwargs)
    finally:
        COMPILER.reset(token)
        eval_frame.set_eval_frame(callback)


around_layers._torchdynamo_disable = True  # type: ignore[attr-defined]
around_layers._torchdynamo_disable_msg = WHY  # type: ignore[attr-defined]


def leave_trace() -> None:
    """Have Dynamo leave the frame of ``around_layers`` alone; what ``torch.compiler.disable`` does, at the first trace:
    nothing else of ours imports Dynamo, which takes a second."""
    from torch._dynamo.eval_frame import skip_code

    skip_code(around_layers.__code__)


leave_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]


def layer(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A layer's ``forward(*args, **kwargs)``, compiled where its model is.

    Not with a cache: a trace would be of the layer's own place in it and of its length, so that Dynamo would reach its
    limit of graphs for one function, and then compile no layer any more.
    """
    callback = None if torch.compiler.is_compiling() else COMPILER.get()
    if callback is None or kwargs.get("past_key_values") is not None:
        return forward(*args, **kwargs)
    _keep_for_recomputation(callback)
    eval_frame = torch._C._dynamo.eval_frame
    before = eval_frame.set_eval_frame(callback)
    try:
        return forward(*args, **kwargs)
    finally:
        eval_frame.set_eval_frame(before)


def _keep_for_recomputation(callback: Any) -> None:
    """Have a checkpointed layer compiled in the backward pass too, where it has to save the tensors that it saves here.

    A reentrant checkpoint saves none here, and is recomputed as it is written.
    """
    frame = force.checkpoint_frame()
    if frame is None or hasattr(frame, _KEPT):
        return
    recompute = frame.recompute_fn

    def recompute_compiled(*args: Any) -> Any:
        token = COMPILER.set(callback)
        try:
            return recompute(*args)
        finally:
            COMPILER.reset(token)

    frame.recompute_fn = recompute_compiled
    setattr(frame, _KEPT, True)


_KEPT = "_kernel_index_compiler"

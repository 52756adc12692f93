"""One order of a training batch's documents in ``numerics("invariant")``, so that sums over tokens do not follow rows.

The decoder computes documents in rows that their tokens decide.  What it returns stands where the caller's tokens
stand.  The output layer takes its rows in the same order.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernel_index.core.by_content import Packing, packed_by_content, scattered
from kernel_index.integrations.hugging_face.change import RAISED

KNOWN = frozenset({"input_ids", "attention_mask", "position_ids", "use_cache"})
"""Arguments of a decoder that are put in order; a call with another tensor or a cache stays as it is."""


KEEPS_ROWS = "_kernel_index_keeps_rows"


class Order(NamedTuple):
    """The packing of a call's documents, and the shape of the caller's rows."""

    packing: Packing
    shape: torch.Size

    def back(self, values: Tensor) -> Tensor:
        """Values of the packed rows at the caller's places, [B, T, …]; 0 for padding."""
        return scattered(self.packing.taken(values), self.packing.places, self.shape)

    def last(self, columns: int) -> Tensor:
        """The places of tokens, in their order, in rows that hold the last ``columns`` of the caller's alone."""
        places, length = self.packing.places, self.shape[1]
        row, column = places // length, places % length - (length - columns)
        return (row * columns + column)[column >= 0]


class _Call:
    """A forward of a model with an output layer; ``order`` is that of its decoder."""

    def __init__(self, kept: Any):
        self.order: Order | None = None
        self.kept = kept  # ``logits_to_keep``


CALL: ContextVar[_Call | None] = ContextVar("kernel_index_call_of_a_model", default=None)


@contextmanager
def call_of_model(arguments: dict[str, Any]) -> Iterator[None]:
    """Inside, the decoder tells the output layer the order of its rows."""
    token = CALL.set(_Call(arguments.get("logits_to_keep", 0)))
    try:
        yield
    finally:
        CALL.reset(token)


def rows_in_order(hidden: Tensor) -> Tensor | None:
    """The rows of a decoder's hidden states [B, K, C] in their order; None where they have none."""
    call = CALL.get()
    if call is None or call.order is None or hidden.ndim != 3 or not torch.is_grad_enabled():
        return None
    (batch, columns), shape = hidden.shape[:2], call.order.shape
    kept = type(call.kept) is int and columns == (call.kept or shape[1])
    return call.order.last(columns) if kept and batch == shape[0] else None


def product_in_order(multiply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A linear layer of what a decoder has returned: the gradient of its weight is a sum over rows, too."""
    rows = rows_in_order(x)
    if rows is None:
        return multiply(x)
    return scattered(multiply(x.flatten(0, 1).index_select(0, rows)), rows, x.shape[:2])


def run_in_order(forward: Callable[..., Any], model: Any, arguments: dict[str, Any]) -> Any | None:
    """A decoder's forward with its documents in one order; None where a call does not allow it."""
    found = None if KEEPS_ROWS in vars(model) else _ordered(model, arguments)
    if found is None:
        return None
    order, ordered = found
    returned = _returned(forward(model, **ordered), order)
    if (call := CALL.get()) is not None:
        call.order = order
    return returned


def check(model: nn.Module) -> None:
    """Mark the decoders that do not compute packed documents as they compute rows: they keep the caller's."""
    from transformers import PreTrainedModel

    for decoder in (m for m in model.modules() if isinstance(m, PreTrainedModel) and is_innermost(m)):
        ids = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [1, 1, 0, 0]], device=decoder.device)
        real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]], device=decoder.device)
        call = {"input_ids": ids, "attention_mask": real, "use_cache": False}
        try:
            with torch.no_grad():
                expected = decoder(**call)[0]
            with torch.enable_grad():  # the two short documents share a row
                found = decoder(**call)[0]
            known = torch.equal(found[real.bool()], expected[real.bool()])
        except RAISED:  # it takes no tokens, or no such option
            known = False
        if not known:
            vars(decoder)[KEEPS_ROWS] = True


def is_innermost(model: nn.Module) -> bool:
    """Whether no other model of Transformers is a part of this one."""
    from transformers import PreTrainedModel

    return not any(isinstance(m, PreTrainedModel) for m in model.modules() if m is not model)


def _ordered(model: Any, arguments: dict[str, Any]) -> tuple[Order, dict[str, Any]] | None:
    tokens, mask, positions = (arguments.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    others = (value for name, value in arguments.items() if name not in KNOWN)
    use_cache = arguments.get("use_cache")
    trains = torch.is_grad_enabled() and (use_cache is False or (use_cache is None and model.training))
    matrices = all(x is None or (isinstance(x, Tensor) and x.ndim == 2) for x in (mask, positions))
    if not trains or not matrices or not isinstance(tokens, Tensor) or tokens.ndim != 2:
        return None
    if any(isinstance(x, Tensor) or hasattr(x, "get_seq_length") for x in others):
        return None
    packing = _packing(tokens, mask, positions)
    if packing is None:
        return None
    changed: dict[str, Any] = {"attention_mask": None, "use_cache": False}
    changed["input_ids"] = packing.rows(tokens, 0)
    changed["position_ids"] = scattered(packing.offset, packing.slots, packing.shape)  # padding: documents of a token
    return Order(packing, tokens.shape), arguments | changed


def _packing(tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> Packing | None:
    """None unless each document counts from 0 without a gap."""
    batch, length = tokens.shape
    column = torch.arange(length, device=tokens.device).expand(batch, -1)
    at = column if positions is None else positions.expand(batch, -1)
    if mask is not None and mask.shape != tokens.shape:
        return None
    if mask is None:  # a new document begins where positions do not go on, as Transformers has it
        begins = torch.nn.functional.pad(at[:, 1:] != at[:, :-1] + 1, (1, 0), value=True)
        document = begins.flatten().cumsum(0)
        places = torch.arange(batch * length, device=tokens.device)
    else:
        places = mask.flatten().nonzero()[:, 0]
        document = places // max(length, 1)
    if not len(places):
        return None
    packing = packed_by_content(document, places, tokens.flatten()[places].long())
    return packing if torch.equal(at.flatten()[packing.places], packing.offset) else None


def _returned(found: Any, order: Order) -> Any:
    """What the decoder returns, each value of a token at the caller's place."""

    def back(value: Any) -> Any:
        if isinstance(value, Tensor) and value.shape[:2] == order.packing.shape:
            return order.back(value)
        return tuple(map(back, value)) if type(value) is tuple else value

    if not dataclasses.is_dataclass(found):
        return back(found)
    for name in list(found.keys()):  # type: ignore[attr-defined]
        found[name] = back(found[name])
    return found

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

from kernel_index.core.by_content import Packing, hooked, packed_by_content, scattered
from kernel_index.integrations.hugging_face.change import RAISED, evaluating

KNOWN = frozenset({"input_ids", "attention_mask", "position_ids", "use_cache"})
"""Arguments of a decoder that are put in order."""

HARMLESS = frozenset({"output_hidden_states", "output_attentions", "return_dict", "num_items_in_batch"})
"""Arguments that have no rows; a call with anything else keeps the caller's."""

KEEPS_ROWS = "_kernel_index_keeps_rows"
UNORDERED = "_kernel_index_calls_in_rows"
"""Counts of calls that keep the caller's rows, by reason, in a decoder's attributes."""

SAMPLED: ContextVar[bool] = ContextVar("kernel_index_masks_by_a_sample", default=False)
"""Set while rows that we packed are computed: their masks are known, and a check of some queries is enough."""


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
    """A forward of a model with an output layer; ``order`` is that of its decoder, if it is called once."""

    def __init__(self, head: nn.Module | None, arguments: dict[str, Any]):
        self.head, self.labels, self.kept = head, arguments.get("labels"), arguments.get("logits_to_keep", 0)
        self.order: Order | None = None
        self.decoders = 0


CALL: ContextVar[_Call | None] = ContextVar("kernel_index_call_of_a_model", default=None)


@contextmanager
def call_of_model(model: Any, arguments: dict[str, Any]) -> Iterator[None]:
    """Inside, the decoder tells the output layer the order of its rows."""
    token = CALL.set(_Call(model.get_output_embeddings(), arguments))
    try:
        yield
    finally:
        CALL.reset(token)


def rows_in_order(head: nn.Module, hidden: Tensor) -> Tensor | None:
    """The rows of a decoder's hidden states [B, K, C] in their order; None where the output layer has none."""
    call = CALL.get()
    if call is None or call.order is None or call.head is not head or hidden.ndim != 3 or not torch.is_grad_enabled():
        return None
    (batch, columns), (rows, length) = hidden.shape[:2], call.order.shape
    kept = type(call.kept) is int and columns == min(call.kept or length, length)
    return call.order.last(columns) if kept and batch == rows else None


def product_in_order(multiply: Callable[[Tensor], Tensor], x: Tensor, rows: Tensor | None) -> Tensor:
    """The output layer's product of x [B, K, C]: the gradient of its weight is a sum over rows, in this order.

    Padding gets what the layer makes of zeros.
    """
    if rows is None:
        return multiply(x)
    flat = x.flatten(0, 1)
    with torch.no_grad():
        padding = multiply(flat.new_zeros(1, flat.shape[1]))
    found = padding.expand(len(flat), -1).index_copy(0, rows, multiply(flat.index_select(0, rows)))
    return found.unflatten(0, x.shape[:2])


def run_in_order(forward: Callable[..., Any], model: Any, arguments: dict[str, Any]) -> Any | None:
    """A decoder's forward with its documents in one order; None where a call keeps the caller's rows."""
    call = CALL.get()
    if call is not None:  # a second decoder's rows are not the first one's
        call.decoders += 1
        call.order = None
    if not _trains(model, arguments):
        return None
    found = _ordered(model, arguments, None if call is None else call.labels)
    if isinstance(found, str):
        return _keep_rows(model, found)
    order, ordered = found
    token = SAMPLED.set(True)
    try:
        returned = _returned(forward(model, **ordered), order)
    finally:
        SAMPLED.reset(token)
    if returned is None:
        return _keep_rows(model, "it returns more than values of tokens")
    if call is not None and call.decoders == 1:
        call.order = order
    return returned


def _keep_rows(model: Any, why: str) -> None:
    counts = vars(model).setdefault(UNORDERED, {})
    counts[why] = counts.get(why, 0) + 1


def _trains(model: Any, arguments: dict[str, Any]) -> bool:
    """With gradients, and without a cache: one that is not asked for is not made in training."""
    use_cache = arguments.get("use_cache")
    if use_cache is None:
        use_cache = not model.training and getattr(model.config, "use_cache", False)
    return torch.is_grad_enabled() and not use_cache


def check(model: nn.Module) -> None:
    """Mark the decoders that do not compute packed documents as they compute rows: they keep the caller's."""
    from transformers import PreTrainedModel

    for decoder in (m for m in model.modules() if isinstance(m, PreTrainedModel) and is_innermost(m)):
        ids = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [1, 1, 0, 0]], device=decoder.device)
        real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]], device=decoder.device)
        call = {"input_ids": ids, "attention_mask": real, "use_cache": False}
        try:
            with evaluating(decoder), torch.no_grad():
                expected = decoder(**call)[0]
            with evaluating(decoder), torch.enable_grad():  # the two short documents share a row
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


def _ordered(model: Any, arguments: dict[str, Any], labels: Any) -> tuple[Order, dict[str, Any]] | str:
    """The order and the arguments that have it; or the reason why the caller's rows are kept."""
    tokens, mask, positions = (arguments.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if KEEPS_ROWS in vars(model):
        return "it does not compute packed documents as it computes rows"
    if not isinstance(tokens, Tensor) or tokens.ndim != 2:
        return "it was not given token ids [B, T]"
    if any(x is not None and not (isinstance(x, Tensor) and x.ndim == 2) for x in (mask, positions)):
        return "its mask or its positions are not [B, T]"
    others = {n: v for n, v in arguments.items() if n not in KNOWN | HARMLESS and v is not None and v is not False}
    if others:
        return f"it was given {', '.join(sorted(others))}"
    if (part := hooked(model)) is not None:
        return f"{part} has a hook, which may look at rows"
    if isinstance(labels, Tensor) and labels.shape == tokens.shape:
        if mask is not None and mask.shape == tokens.shape and _predicts_from_padding(mask, labels):
            return "padding has a label"
    else:
        labels = None
    packing = _packing(tokens, mask, positions, labels)
    if packing is None:
        return "positions of a document do not count from 0"
    changed: dict[str, Any] = {"attention_mask": None, "use_cache": False}
    changed["input_ids"] = packing.rows(tokens, 0)
    changed["position_ids"] = scattered(packing.offset, packing.slots, packing.shape)  # padding: documents of a token
    return Order(packing, tokens.shape), arguments | changed


def _predicts_from_padding(mask: Tensor, labels: Tensor) -> bool:
    """Whether a label is that of the token behind padding, or of padding: label t + 1 is predicted at t."""
    return bool(((mask[:, :-1] == 0) & (labels[:, 1:] != -100)).any())


def _packing(tokens: Tensor, mask: Tensor | None, positions: Tensor | None, labels: Tensor | None) -> Packing | None:
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
    words = (x.flatten()[places].long() for x in (tokens, labels) if x is not None)
    packing = packed_by_content(document, places, *words)
    return packing if torch.equal(at.flatten()[packing.places], packing.offset) else None


def _returned(found: Any, order: Order) -> Any | None:
    """What the decoder returns, each value of a token at the caller's place; None where it returns something else."""
    fits = True

    def back(value: Any) -> Any:
        nonlocal fits
        if isinstance(value, Tensor):
            fits = fits and value.shape[:2] == order.packing.shape
            return order.back(value) if fits else value
        return tuple(map(back, value)) if type(value) is tuple else value

    if not dataclasses.is_dataclass(found):
        moved = back(found)
        return moved if fits else None
    moved = {name: back(value) for name, value in found.items()}  # type: ignore[attr-defined]
    return type(found)(**moved) if fits else None

"""Turns a mask function of Transformers into the ``MaskContract`` that equals it, if there is one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernel_index as ki

ROWS = 1024
"""Queries whose rows of the dense mask are compared at a time, so that the mask is never in memory as a whole."""


@dataclass(frozen=True)
class Prepared:
    """A contract that a model passes to its attention layers, with the members that Transformers expects of a mask."""

    contract: ki.MaskContract
    ndim = 4

    def contiguous(self) -> "Prepared":
        return self

    def to(self, device: Any) -> "Prepared":
        return Prepared(self.contract.to(device))


class Call(NamedTuple):
    """One request for a mask: sizes, the absolute positions of the first query and key, and the predicate.

    ``padding`` is bool [B, S], True for real keys, or None.
    """

    batch: int
    queries: int
    keys: int
    q_start: int
    k_start: int
    predicate: Callable[..., Tensor]
    padding: Tensor | None
    window: int | None
    device: Any


def contract_for(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: Any = "cpu",
    **kwargs: Any,
) -> Any:
    """The mask of one forward pass, in the signature of ``AttentionMaskInterface``.

    A ``Prepared`` contract if one equals the mask function; else the dense mask that PyTorch's attention takes, as for
    a static cache, whose keys go on after the last query.  Plain causal and padded calls are recognised by their
    arguments.  Any other function is evaluated along the diagonal, which gives the documents; the contract found is
    compared with it everywhere before it is used.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    if isinstance(attention_mask, Prepared):
        return attention_mask
    readable = not (torch.compiler.is_compiling() or isinstance(q_offset, Tensor) or use_vmap)
    if readable and q_offset + q_length == kv_offset + kv_length:
        padding = _padding(attention_mask, kv_length, kv_offset)
        call = Call(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            padding,
            local_size,
            torch.device(device),
        )
        plain = mask_function is causal_mask_function
        known = plain and (padding is None or _is_one_run(padding))
        found = ki.MaskContract() if plain and padding is None else _recovered(call, compare=not known)
        if found is not None:
            return Prepared(found)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
    )


def _padding(attention_mask: Tensor | None, keys: int, k_start: int) -> Tensor | None:
    """The columns of the two-dimensional mask for these keys; None if all of them are real."""
    if attention_mask is None:
        return None
    real = attention_mask[:, k_start : k_start + keys].bool()
    real = torch.nn.functional.pad(real, (0, keys - real.shape[1]))
    return None if bool(real.all()) else real


def _is_one_run(real: Tensor) -> bool:
    """Whether the real keys of each row are consecutive: a gap would end a document, but does not in a causal mask."""
    return not bool(((~real[:, :-1] & real[:, 1:]).sum(-1) + real[:, 0] > 1).any())


def _recovered(call: Call, compare: bool) -> ki.MaskContract | None:
    """The contract whose every entry equals the predicate's, or None."""
    doc_ids = _documents(call)
    causal = not compare or not _sees_ahead(call)
    windows: list[Any] = [(None, None)]
    if call.window is not None:  # the window that the call names is tried, then compared
        windows.append((call.window - 1, 0) if causal else (call.window, call.window))
    for window in windows:
        found = ki.MaskContract(causal, window, doc_ids)
        if not compare or _equals(found, call):
            return found
    return None


def _at(call: Call, q: Tensor, k: Tensor) -> Tensor:
    """The predicate at absolute positions that broadcast against each other, with the batch first."""
    rows = torch.arange(call.batch, device=call.device).view(-1, *(1,) * max(q.ndim, k.ndim))
    allowed = call.predicate(rows, torch.zeros_like(rows), q, k)
    return allowed.expand(torch.broadcast_shapes(rows.shape, q.shape, k.shape))


def _documents(call: Call) -> Tensor | None:
    """Ids that change where a key does not see the one before it; padding is −1; None for one document and no padding.

    The predicate is evaluated at positions of this call's keys only.
    """
    at = torch.arange(call.keys, device=call.device) + call.k_start
    breaks = ~_at(call, at[1:], at[:-1])
    ids = torch.nn.functional.pad(breaks.cumsum(-1), (1, 0))
    if call.padding is not None:
        ids = ids.masked_fill(~call.padding, -1)
    elif not bool(breaks.any()):
        return None
    return ids


def _sees_ahead(call: Call) -> bool:
    at = torch.arange(call.keys, device=call.device) + call.k_start
    return bool(_at(call, at[:-1], at[1:]).any())


def _equals(contract: ki.MaskContract, call: Call) -> bool:
    """Whether the contract allows what the predicate allows, for every query that is not padding itself."""
    bounds = contract.intervals(call.batch, call.queries, call.keys, device=call.device)
    key = torch.arange(call.keys, device=call.device)
    for first in range(0, call.queries, ROWS):
        query = torch.arange(first, min(first + ROWS, call.queries), device=call.device)
        expected = _at(call, (query + call.q_start)[:, None], key + call.k_start)
        start, end = (b[:, query, None] for b in bounds)
        actual = (key >= start) & (key < end)
        if call.padding is not None:
            query_column = (query + (call.q_start - call.k_start)).clamp(0, call.keys - 1)
            expected = expected & call.padding[:, None, :]
            expected = torch.where(call.padding[:, query_column, None], expected, actual)
        if not torch.equal(actual.expand_as(expected), expected):
            return False
    return True

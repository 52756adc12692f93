"""Turns a mask function of Transformers into the ``MaskContract`` that equals it, if there is one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernel_index as ki
from kernel_index.core.numerics import needs_ordinary_numerics
from kernel_index.integrations.hugging_face.implementation import own_implementation
from kernel_index.integrations.hugging_face.lazy import Lazy
from kernel_index.integrations.hugging_face.one_order import SAMPLED

ROWS = 1024
"""Queries whose rows of the dense mask are compared at a time, so that the mask is never in memory as a whole."""


SAMPLE = 64
"""Of all queries, where the documents are our own."""


LOST_KEYS = "a cache keeps the last keys of a window alone: pass a DynamicCache()"


class LazyMask(Lazy):
    """A contract in the place of the dense mask that the model had before: bool or additive, [B, 1, T, S].

    Our attention takes the contract.  Code that reads the mask, as an indexer or a position bias does, gets the dense
    one, made as the model's own attention asks for it.
    """

    contract: ki.MaskContract
    request: dict[str, Any]
    own: str

    @staticmethod
    def of(contract: ki.MaskContract, request: dict[str, Any], own: str) -> "LazyMask":
        shape = (request["batch_size"], 1, request["q_length"], request["kv_length"])
        dtype = request.get("dtype", torch.float32) if own == "eager" else torch.bool
        device = request.get("target", torch.device(request["device"]))
        return LazyMask.wrap(shape, dtype, device, contract=contract, request=request, own=own)

    def record(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in SAME or (func is Tensor.__getitem__ and self._is_whole(args[1])):
            return self
        if func is Tensor.to and len(args) == 2 and isinstance(args[1], torch.device | str | int):
            device = torch.empty(0, device=args[1]).device
            return LazyMask.of(self.contract.to(device), {**self.request, "target": device}, self.own)
        return NotImplemented

    def _is_whole(self, index: Any) -> bool:
        """Whether ``mask[index]`` is the mask, as models write ``mask[:, :, :, :keys]``."""
        index = index if isinstance(index, tuple) else (index,)
        if len(index) > 4 or not all(isinstance(i, slice) for i in index):
            return False
        return all(range(*i.indices(n)) == range(n) for i, n in zip(index, self.shape, strict=False))

    def formula(self, *operands: Tensor) -> Tensor:
        return self.for_implementation(self.own if self.own in DENSE else "sdpa")

    def for_implementation(self, name: str) -> Any:
        """The mask that Transformers makes for this attention: dense, its own object, or None."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        request = {k: v for k, v in self.request.items() if k != "target"}
        if name in DENSE:
            request["allow_is_causal_skip"] = request["allow_is_bidirectional_skip"] = False
        made = ALL_MASK_ATTENTION_FUNCTIONS[name](**request)
        return made.to(self.request["target"]) if "target" in self.request and isinstance(made, Tensor) else made


SAME = frozenset({Tensor.contiguous, Tensor.detach})
DENSE = ("eager", "sdpa")


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
    config: Any = None,
    **kwargs: Any,
) -> Any:
    """The mask of one forward pass, in the signature of ``AttentionMaskInterface``.

    A ``LazyMask`` if a contract equals the mask function; else what the model's own attention takes, as for
    a static cache, whose keys go on after the last query.  Plain causal and padded calls are recognised by their
    arguments.  Any other function is evaluated along the diagonal, which gives the documents; the contract found is
    compared with it everywhere before it is used.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function

    if isinstance(attention_mask, LazyMask):
        return attention_mask
    if kv_offset != 0:  # a cache without its first keys
        needs_ordinary_numerics("attention", LOST_KEYS)
    own = own_implementation(config)
    request = dict(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        use_vmap=use_vmap,
        device=device,
        config=config,
        **kwargs,
    )
    readable = not (torch.compiler.is_compiling() or use_vmap)
    if readable and not isinstance(q_offset, Tensor):
        padding, place = _padding(attention_mask, kv_length, kv_offset), torch.device(device)
        call = Call(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, padding, local_size, place
        )  # fmt: skip
        aligned = q_offset + q_length == kv_offset + kv_length
        found = _recovered(call) if aligned or mask_function is bidirectional_mask_function else None
        if found is not None and _needs_none(found, call, own, kwargs):
            return None
        if found is not None:
            return LazyMask.of(found, request, own)
    return ALL_MASK_ATTENTION_FUNCTIONS[own](**request)


def _needs_none(contract: ki.MaskContract, call: Call, own: str, skips: dict[str, Any]) -> bool:
    """Whether PyTorch's attention is given no mask: what is plain, a layer may tell by that."""
    if own != "sdpa" or not contract.is_band or call.window is not None:
        return False
    if contract.causal:
        return bool(skips.get("allow_is_causal_skip")) and call.queries in (1, call.keys)
    return bool(skips.get("allow_is_bidirectional_skip"))


def _padding(attention_mask: Tensor | None, keys: int, k_start: int) -> Tensor | None:
    """The columns of the two-dimensional mask for these keys; None if all of them are real."""
    if attention_mask is None:
        return None
    real = attention_mask[:, k_start : k_start + keys].bool()
    real = torch.nn.functional.pad(real, (0, keys - real.shape[1]))
    return None if bool(real.all()) else real


def _recovered(call: Call) -> ki.MaskContract | None:
    """The contract whose every entry equals the predicate's, or None.

    Padding at the end of a row is a prefix of its keys; padding at its start is no document, so that a query there sees
    nothing, as causality has it.  Two predicates are known; any other one is compared.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    prefix, start = _ends(call.padding)
    one_run = call.padding is None or _is_one_run(call.padding)
    if call.predicate is bidirectional_mask_function:
        return ki.MaskContract(causal=False, key_validity=prefix) if one_run and start is None else None
    known = call.predicate is causal_mask_function
    if known and one_run:
        return ki.MaskContract(doc_ids=start, key_validity=prefix)
    doc_ids = _documents(call, start)
    causal = known or not _sees_ahead(call)
    windows: list[Any] = [(None, None)]
    if call.window is not None:  # the window that the call names is tried, then compared
        windows.append((call.window - 1, 0) if causal else (call.window, call.window))
    for window in windows:
        found = ki.MaskContract(causal, window, doc_ids, key_validity=prefix)
        if _equals(found, call):
            return found
    return None


def _ends(real: Tensor | None) -> tuple[ki.AttentionValidity | None, Tensor | None]:
    """Where the real keys of each row end, as a validity, and ids that are −1 before they begin; None where none is."""
    if real is None:
        return None, None
    position = torch.arange(real.shape[1], device=real.device)
    count = torch.where(real, position + 1, 0).amax(-1)
    before = torch.where(real, position, real.shape[1]).amin(-1)[:, None] > position
    prefix = ki.attention_validity(valid_token_counts=count) if bool((count < real.shape[1]).any()) else None
    return prefix, -before.to(torch.int64) if bool((before & (position < count[:, None])).any()) else None


def _is_one_run(real: Tensor) -> bool:
    """Whether the real keys of each row are consecutive: a causal mask hides a gap between them."""
    return not bool(((~real[:, :-1] & real[:, 1:]).sum(-1) + real[:, 0] > 1).any())


def _at(call: Call, q: Tensor, k: Tensor) -> Tensor:
    """The predicate at absolute positions that broadcast against each other, with the batch first."""
    rows = torch.arange(call.batch, device=call.device).view(-1, *(1,) * max(q.ndim, k.ndim))
    allowed = call.predicate(rows, torch.zeros_like(rows), q, k)
    return allowed.expand(torch.broadcast_shapes(rows.shape, q.shape, k.shape))


def _documents(call: Call, start: Tensor | None) -> Tensor | None:
    """Ids that change where a key does not see the one before it, −1 where ``start`` is; None for one document.

    The predicate is evaluated at positions of this call's keys only.
    """
    at = torch.arange(call.keys, device=call.device) + call.k_start
    breaks = ~_at(call, at[1:], at[:-1])
    if not bool(breaks.any()):
        return start
    ids = torch.nn.functional.pad(breaks.cumsum(-1), (1, 0))
    return ids if start is None else torch.where(start < 0, -1, ids)


def _sees_ahead(call: Call) -> bool:
    at = torch.arange(call.keys, device=call.device) + call.k_start
    return bool(_at(call, at[:-1], at[1:]).any())


def _equals(contract: ki.MaskContract, call: Call) -> bool:
    """Whether the contract allows what predicate and padding allow, for some queries where ``SAMPLED`` is set."""
    bounds = contract.intervals(call.batch, call.queries, call.keys, device=call.device)
    key = torch.arange(call.keys, device=call.device)
    apart = -(-call.queries // SAMPLE) if SAMPLED.get() else 1
    for first in range(0, call.queries, apart * ROWS):
        query = torch.arange(first, min(first + apart * ROWS, call.queries), apart, device=call.device)
        expected = _at(call, (query + call.q_start)[:, None], key + call.k_start)
        if call.padding is not None:
            expected = expected & call.padding[:, None, :]
        start, end = (b[:, query, None] for b in bounds)
        if not torch.equal(((key >= start) & (key < end)).expand_as(expected), expected):
            return False
    return True

"""Argument checks and backend eligibility of ``fa4_kvcache_decode``."""

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import checks, device_documents, document_attention, native, rules
from kernel_index.core.fa4_support import Support, support_of
from kernel_index.core.numerics import is_invariant
from kernel_index.core.target import fa4_package_why_not, target_of
from kernel_index.kvcache.decode_arguments import REQUIRES_APPEND_KV, cast_to_cache, check_tensors
from kernel_index.masks.attention_arguments import check_scoring, check_sink, scale_of
from kernel_index.masks.doc_window_mask.contract import Window, normalize_window

REQUIRES_CAUSAL = "dense_fa4_kvcache_requires_causal"
NO_SLIDING_WINDOW = "dense_fa4_kvcache_no_sliding_window"
INVALID_BLOCK_TABLE_RANK = "dense_fa4_kvcache_invalid_block_table_rank"
BLOCK_TABLE_BATCH_MISMATCH = "dense_fa4_kvcache_block_table_batch_mismatch"
CUDA_ONLY = "dense_fa4_kvcache_cuda_only"

MANY_QUERIES = 16
FEW_ROWS = 64
"""Queries times heads of a KV head: one tile of the Triton kernel."""


class DecodeCall(NamedTuple):
    """A checked call; its fields are the arguments of ``fa4_kvcache_decode``."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor
    k: Tensor | None
    v: Tensor | None
    causal: bool
    window: Window
    softcap: float
    block_table: Tensor | None
    scale: float
    sink: Tensor | None  # [H]

    @property
    def new_tokens(self) -> int:
        return 0 if self.k is None else self.k.shape[1]

    @property
    def window_bounds(self) -> Window:
        """How many tokens a query sees to its left and to its right; None is unlimited."""
        return self.window[0], 0 if self.causal else self.window[1]

    @property
    def is_global(self) -> bool:
        """Whether no window cuts anything off: every spelling of "no window", ``(-1, 0)`` with ``causal`` included."""
        left, right = self.window
        return left is None and (self.causal or right is None)


def check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | int,
    k: Tensor | None,
    v: Tensor | None,
    causal: bool,
    window_size: Any,
    softcap: float,
    block_table: Tensor | None,
    scale: float | None,
    sink: Tensor | None,
) -> DecodeCall:
    """The call, once nothing but a backend's rules can refuse it; those refuse a table of the wrong rank."""
    if isinstance(cache_seqlens, int) and isinstance(q, Tensor) and q.ndim > 0:
        checks.is_int("cache_seqlens", cache_seqlens, minimum=0)
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    window = normalize_window(window_size)
    q, k, v = cast_to_cache(k_cache, q, k, v)
    check_tensors(q, k_cache, v_cache, cache_seqlens, k, v, block_table)
    checks.is_bool("causal", causal)
    check_scoring(scale, softcap)
    check_sink(sink, q)
    assert isinstance(cache_seqlens, Tensor)
    scale = scale_of(q, scale)
    call = DecodeCall(q, k_cache, v_cache, cache_seqlens, k, v, causal, window, softcap, block_table, scale, sink)
    _check_values(call)
    return call


def key_intervals(total: Tensor, queries: int, window_bounds: Window) -> tuple[Tensor, Tensor]:
    """The keys ``start ≤ s < end`` of each query, int64 [B, Lq]; the last query is at the last key."""
    left, right = window_bounds
    position = total[:, None] - queries + torch.arange(queries, device=total.device)
    end = total[:, None].expand_as(position) if right is None else torch.minimum(position + right + 1, total[:, None])
    start = torch.zeros_like(position) if left is None else position - left
    return start.clamp(min=0), end.clamp(min=0)


def _check_values(call: DecodeCall) -> None:
    """Capacity, page ids and owners, where they are on the host; nothing waits for a device.

    For caches on a device, ``ContiguousKVCache`` and ``PagedKVCache`` check the same on the host in ``begin``.
    """
    lengths, table, new = call.cache_seqlens, call.block_table, call.new_tokens
    if not rules.host_readable(lengths) or (
        table is not None and (not rules.host_readable(table) or table_rule(lengths, table))
    ):
        return
    if lengths.numel() == 0:
        return
    shortest, longest = (int(x) for x in lengths.aminmax())
    if shortest < 0:
        raise ValueError(f"cache_seqlens must be at least 0, got {shortest}")
    pages, page = call.k_cache.shape[:2]
    capacity = page * (1 if table is None else table.shape[1])
    if longest + new > capacity:
        room = f"{capacity - new}, so that {new} new tokens fit into {capacity}"
        raise ValueError(f"cache_seqlens must be at most {room}, got {longest}")
    if table is not None:
        _check_pages(pages, page, lengths.tolist(), new, table)


def _check_pages(pages: int, page: int, lengths: list[int], new: int, table: Tensor) -> None:
    """Plain Python, because a row has tens of pages: a dozen PyTorch calls would cost more than the decoding step."""
    ends = [-(-(n + new) // page) for n in lengths]  # of what is read
    rows = [ids[:end] for ids, end in zip(table[:, : max(ends)].tolist(), ends, strict=True)]
    users = Counter(i for ids in rows for i in ids)
    if not users:
        return
    low, high = min(users), max(users)
    if low < 0 or high >= pages:
        raise ValueError(f"block_table must hold page ids below {pages}, got {low if low < 0 else high}")
    if new == 0:
        return
    written = (i for ids, n in zip(rows, lengths, strict=True) for i in ids[n // page :])
    shared = next((i for i in written if users[i] > 1), None)
    if shared is not None:
        raise ValueError(f"block_table must give a written page to one row alone, got page {shared} more than once")


def table_rule(rows: Tensor, table: Tensor | None) -> str | None:
    """The rules for a block table that hold for every backend."""
    if table is None:
        return None
    if table.ndim != 2:
        return INVALID_BLOCK_TABLE_RANK
    if table.shape[0] != rows.shape[0]:
        return BLOCK_TABLE_BATCH_MISMATCH
    return None


def reference_why_not(call: DecodeCall) -> str | None:
    return table_rule(call.q, call.block_table)


def fa4_gate(call: DecodeCall) -> str | None:
    """The conditions of the original entry, in its order and with its reason strings."""
    if not call.causal:
        return REQUIRES_CAUSAL
    if not call.is_global:
        return NO_SLIDING_WINDOW
    if call.k is None:
        return REQUIRES_APPEND_KV
    if (rule := table_rule(call.q, call.block_table)) is not None:
        return rule
    if target_of(call.q.device).kind != "cuda":
        return CUDA_ONLY
    return None


def fa4_why_not(call: DecodeCall) -> str | None:
    if (rule := fa4_gate(call)) is not None:
        return rule
    if rules.wants_gradient(call.q, call.k, call.v, call.sink):
        return rules.NO_BACKWARD
    if call.q.dtype not in rules.HALF:
        return "flash-attn-4 takes float16 and bfloat16"
    rule = _package_rule(support_of(target_of(call.q.device).arch), call.q.shape[-1], call.softcap, call.sink)
    return fa4_package_why_not() if rule is None else rule


def _package_rule(support: Support | None, head_size: int, softcap: float, sink: Tensor | None) -> str | None:
    if support is None:
        return "flash-attn-4 does not know this architecture"
    if sink is not None and not support.sink:
        return "flash-attn-4 has no sink on this architecture"
    if not support.varlen:
        return "flash-attn-4 takes no ragged lengths on this architecture"
    if not support.takes_head_size(head_size):
        return "flash-attn-4 does not take this head size on this architecture"
    if softcap and not support.softcap:
        return "flash-attn-4 has no softcap on this architecture"
    return None


def pages_directly(support: Support | None, head_size: int) -> bool:
    """Whether flash-attn-4 reads pages through the table; else the prefix is gathered first."""
    return support is not None and support.paged and head_size % support.paged_head_multiple == 0


def fa4_details(call: DecodeCall) -> tuple[tuple[str, Any], ...]:
    if call.block_table is None:
        return (("cache", "contiguous"),)
    direct = pages_directly(support_of(target_of(call.q.device).arch), call.q.shape[-1])
    return (("cache", "page_table" if direct else "gathered_prefix"),)


def triton_why_not(call: DecodeCall) -> str | None:
    q, table = call.q, call.block_table
    if (rule := table_rule(q, table)) is not None:
        return rule
    rule = rules.triton_why_not(q, call.k_cache, call.v_cache, call.k, call.v, call.cache_seqlens, table, call.sink)
    if rule is not None:
        return rule
    if rules.wants_gradient(q, call.k, call.v, call.sink):
        return rules.NO_BACKWARD
    if q.shape[-1] > rules.WIDEST_HEAD:
        return "takes head sizes up to 256"
    if is_invariant():
        return device_documents.why_not(q, call.k_cache, call.v_cache, call.scale)
    if call.k_cache.stride(-1) != 1 or call.k_cache.stride() != call.v_cache.stride():
        return "needs caches of the same strides, with a dense head dimension: they are written in place"
    return None


def triton_not_worth(call: DecodeCall) -> str | None:
    rows = call.q.shape[1] * (call.q.shape[2] // call.k_cache.shape[2])
    if rows > FEW_ROWS and fa4_why_not(call) is None:
        return "many queries: flash-attn-4 takes them in larger tiles"
    return rules.triton_not_worth(call.q)


def native_why_not(call: DecodeCall) -> str | None:
    if (rule := _host_why_not(call)) is not None:
        return rule
    if call.block_table is not None and not rules.host_readable(call.block_table):
        return "needs a block table of plain values: it writes where they say"
    if is_invariant():  # it appends by PyTorch's own scatter, and takes caches of any layout
        return document_attention.why_not(call.q, call.k_cache, call.v_cache, call.k, call.v, call.sink)
    if not (call.k_cache.is_contiguous() and call.v_cache.is_contiguous()):
        return "needs a contiguous cache: it is read and written in place"
    tensors = (call.q, call.k_cache, call.v_cache, call.k, call.v, call.sink)
    return native.why_not(*(t for t in tensors if t is not None))


def native_not_worth(call: DecodeCall) -> str | None:
    return "many queries: matrix products are faster" if call.q.shape[1] > MANY_QUERIES else None


def sdpa_why_not(call: DecodeCall) -> str | None:
    if (rule := _host_why_not(call)) is not None:
        return rule
    if call.sink is not None:
        return "scaled_dot_product_attention has no sink"
    return "scaled_dot_product_attention has no softcap" if call.softcap != 0 else None


def _host_why_not(call: DecodeCall) -> str | None:
    """The rules of every backend that reads the lengths on the host."""
    if (rule := table_rule(call.q, call.block_table)) is not None:
        return rule
    if rules.wants_gradient(call.q, call.k, call.v, call.sink):
        return rules.NO_BACKWARD
    if torch.compiler.is_compiling():
        return "torch.compile is tracing: lengths are read on the host"
    if target_of(call.q.device).kind != "cpu":
        return "needs CPU tensors: lengths are read on the host"
    if not rules.host_readable(call.cache_seqlens):
        return "inside a transform or dispatch mode: lengths are read on the host"
    return None

"""Who may call ``fa4_kvcache_decode``, and who may answer."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from kernel_index.core import checks, native, rules
from kernel_index.core.fa4_support import Support, support_of
from kernel_index.core.target import has_package, target_of
from kernel_index.masks.doc_window_mask.contract import Window

REQUIRES_CAUSAL = "dense_fa4_kvcache_requires_causal"
NO_SLIDING_WINDOW = "dense_fa4_kvcache_no_sliding_window"
REQUIRES_APPEND_KV = "dense_fa4_kvcache_requires_append_kv"
INVALID_BLOCK_TABLE_RANK = "dense_fa4_kvcache_invalid_block_table_rank"
BLOCK_TABLE_BATCH_MISMATCH = "dense_fa4_kvcache_block_table_batch_mismatch"
CUDA_ONLY = "dense_fa4_kvcache_cuda_only"


def check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Any, k: Any, v: Any, causal: Any, softcap: Any, table: Any
) -> None:
    """Everything that the call's metadata can get wrong, but for the table's rank and rows: no backend takes those."""
    for name, value, legend in (
        ("q", q, "[B, Lq, H, D]"),
        ("k_cache", k_cache, "[B, Tmax, K, D] or [pages, page, K, D]"),
        ("v_cache", v_cache, "[B, Tmax, K, D] or [pages, page, K, D]"),
    ):
        checks.is_floating(name, value)
        checks.has_rank(name, value, 4, legend)
        checks.has_dtype(name, value, q.dtype, "like q")
        checks.on_device(name, value, q, "q")
    batch, _, heads, width = q.shape
    kv_heads = k_cache.shape[2]
    checks.has_shape("k_cache", k_cache, (*k_cache.shape[:2], kv_heads, width), "of q's head size,")
    checks.has_shape("v_cache", v_cache, tuple(k_cache.shape), "of k_cache's shape")
    if width < 1:
        raise ValueError(f"q must be of head size at least 1, got shape {tuple(q.shape)}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"q must be of a multiple of k_cache's {kv_heads} heads, got {heads}")
    if k_cache.requires_grad or v_cache.requires_grad:
        raise ValueError("k_cache and v_cache must be without gradients: they are written in place, got requires_grad")
    _check_new(q, k, v, kv_heads)
    checks.is_bool("causal", causal)
    checks.is_real("softcap", softcap)
    if softcap < 0:
        raise ValueError(f"softcap must be at least 0 (0 is off), got {softcap}")
    checks.is_integer_tensor("cache_seqlens", lengths)
    checks.has_shape("cache_seqlens", lengths, (batch,), "one length for each row of q, [B]")
    checks.on_device("cache_seqlens", lengths, q, "q")
    if table is None:
        checks.has_shape("k_cache", k_cache, (batch, *k_cache.shape[1:]), "of q's batch size where no table is given,")
    else:
        checks.is_integer_tensor("block_table", table)
        checks.on_device("block_table", table, q, "q")


def _check_new(q: Tensor, k: Any, v: Any, kv_heads: int) -> None:
    if (k is None) != (v is None):
        missing, given = ("k", "v") if k is None else ("v", "k")
        raise ValueError(f"{missing} must be given where {given} is ({REQUIRES_APPEND_KV}), got None")
    if k is None:
        return
    for name, value in (("k", k), ("v", v)):
        checks.is_floating(name, value)
        checks.has_rank(name, value, 4, "[B, Ln, K, D]")
        checks.has_dtype(name, value, q.dtype, "like q")
        checks.on_device(name, value, q, "q")
        legend = "[B, Ln, K, D] with q's B and D, and the heads of the cache,"
        checks.has_shape(name, value, (q.shape[0], k.shape[1], kv_heads, q.shape[3]), legend)


def check_values(k_cache: Tensor, lengths: Tensor, new: int, table: Tensor | None) -> None:
    """Capacity, page ids and owners, where they are on the host; a device is never waited for.

    On a device the books that ``ContiguousKVCache`` and ``PagedKVCache`` keep on the host do this before the call.
    """
    if not rules.host_readable(lengths) or (
        table is not None and (not rules.host_readable(table) or table_rule(lengths, table))
    ):
        return
    if lengths.numel() == 0:
        return
    shortest, longest = (int(x) for x in lengths.aminmax())
    if shortest < 0:
        raise ValueError(f"cache_seqlens must be at least 0, got {shortest}")
    capacity = k_cache.shape[1] * (1 if table is None else table.shape[1])
    if longest + new > capacity:
        room = f"{capacity - new}, so that {new} new tokens fit into {capacity}"
        raise ValueError(f"cache_seqlens must be at most {room}, got {longest}")
    if table is not None:
        _check_pages(k_cache.shape[0], k_cache.shape[1], lengths.tolist(), new, table)


def _check_pages(pages: int, page: int, lengths: list[int], new: int, table: Tensor) -> None:
    """In plain Python: a step has tens of pages a row, and a dozen calls of torch would cost more than the step."""
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
        raise ValueError(f"block_table must give a written page to one row alone, got page {shared} in several places")


def table_rule(rows: Tensor, table: Tensor | None) -> str | None:
    """The rule that a block table breaks whatever the backend."""
    if table is None:
        return None
    if table.ndim != 2:
        return INVALID_BLOCK_TABLE_RANK
    if table.shape[0] != rows.shape[0]:
        return BLOCK_TABLE_BATCH_MISMATCH
    return None


def reach_of(causal: bool, window: Window) -> Window:
    """How far a query sees to the left and to the right; None is unlimited."""
    return window[0], 0 if causal else window[1]


def is_global(causal: bool, window: Window) -> bool:
    """Every spelling of "no window" passes, ``(-1, 0)`` beside ``causal`` among them."""
    left, right = window
    return left is None and (causal or right is None)


def fa4_gate(q: Tensor, k: Tensor | None, causal: bool, window: Window, table: Tensor | None) -> str | None:
    """The entry's own gate, in the order in which its callers know it."""
    if not causal:
        return REQUIRES_CAUSAL
    if not is_global(causal, window):
        return NO_SLIDING_WINDOW
    if k is None:
        return REQUIRES_APPEND_KV
    if (rule := table_rule(q, table)) is not None:
        return rule
    if target_of(q.device).kind != "cuda":
        return CUDA_ONLY
    return None


def fa4_why_not(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    causal: bool,
    window: Window,
    softcap: float,
    table: Tensor | None,
) -> str | None:
    gate = fa4_gate(q, k, causal, window, table)
    if gate is not None:
        return gate
    if not has_package("flash_attn"):
        return "needs the flash-attn-4 package (pip install flash-attn-4)"
    if rules.wants_gradient(q, k, v):
        return rules.NO_BACKWARD
    if q.dtype not in (torch.float16, torch.bfloat16):
        return "flash-attn-4 takes float16 and bfloat16"
    return _package_rule(support_of(target_of(q.device).arch), q.shape[-1], softcap)


def _package_rule(support: Support | None, head_size: int, softcap: float) -> str | None:
    if support is None:
        return "flash-attn-4 does not know this architecture"
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


def fa4_details(q: Tensor, *call: Any) -> tuple[tuple[str, Any], ...]:
    table = call[-1]
    direct = table is not None and pages_directly(support_of(target_of(q.device).arch), q.shape[-1])
    return (("cache", "contiguous" if table is None else "page_table" if direct else "gathered_prefix"),)


def triton_why_not(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    causal: bool,
    window: Window,
    softcap: float,
    table: Tensor | None,
) -> str | None:
    if (rule := table_rule(q, table)) is not None:
        return rule
    if (rule := rules.triton_why_not(q, k_cache, v_cache, lengths, table)) is not None:
        return rule
    if rules.wants_gradient(q, k, v):
        return rules.NO_BACKWARD
    if q.shape[-1] > 256:
        return "takes head sizes up to 256"
    return None


def native_why_not(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor | None, v: Tensor | None, *rest: Any
) -> str | None:
    table = rest[-1]
    if (rule := host_why_not(q, lengths, k, v, table)) is not None:
        return rule
    if table is not None and not rules.host_readable(table):
        return "needs a block table of plain values: it writes where they say"
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        return "needs a contiguous cache: it is read and written in place"
    return native.why_not(*(t for t in (q, k_cache, v_cache, k, v) if t is not None))


MANY_QUERIES = 16


def native_not_worth(q: Tensor, *_: Any) -> str | None:
    return "many queries: products of matrices pay" if q.shape[1] > MANY_QUERIES else None


def sdpa_why_not(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor | None, v: Tensor | None, *rest: Any
) -> str | None:
    _, _, softcap, table = rest
    if (rule := host_why_not(q, lengths, k, v, table)) is not None:
        return rule
    return "scaled_dot_product_attention has no softcap" if softcap != 0 else None


def host_why_not(q: Tensor, lengths: Tensor, k: Tensor | None, v: Tensor | None, table: Tensor | None) -> str | None:
    """What every backend asks that reads the lengths on the host."""
    if (rule := table_rule(q, table)) is not None:
        return rule
    if rules.wants_gradient(q, k, v):
        return rules.NO_BACKWARD
    if torch.compiler.is_compiling():
        return "torch.compile is tracing: lengths are read on the host"
    if target_of(q.device).kind != "cpu":
        return "needs CPU tensors: lengths are read on the host"
    if not rules.host_readable(lengths):
        return "inside a transform or dispatch mode: lengths are read on the host"
    return None


def reference_why_not(q: Tensor, *call: Any) -> str | None:
    return table_rule(q, call[-1])

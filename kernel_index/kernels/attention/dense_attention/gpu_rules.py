"""Backend eligibility of ``attention`` and ``attention_with_lse`` on a GPU."""

import functools
import inspect

import torch

from kernel_index.core import device_documents, measured, rules
from kernel_index.core.fa4_support import support_of
from kernel_index.core.numerics import is_invariant
from kernel_index.core.target import fa4_package_why_not, has_package, target_of, triton_version
from kernel_index.kernels.attention.dense_attention.contract import NO_MASK, AttentionCall, needs_no_mask
from kernel_index.masks.doc_window_mask.contract import DENSE_LIMIT

# What was measured


def measured_kind(call: AttentionCall) -> tuple[str, ...]:
    """What a measured row must have in common with the call; empty for calls like which nothing is measured."""
    mask, tokens = call.mask, call.q.shape[1]
    if call.q.dtype not in rules.HALF or tokens != call.k.shape[1] or call.sizes.offset != 0:
        return ()
    left, right = mask.window_bounds
    left = None if left is None or left >= tokens - 1 else left
    right = None if right is None or right >= tokens - 1 else right
    if mask.counts is not None or mask.key_counts is not None or (right != 0 and (left, right) != (None, None)):
        return ()
    known = mask.doc_ids is not None and mask.lengths_are_known(call.sizes)
    has = {
        "documents": mask.doc_ids is not None and not known,
        "full": right is None,
        "lengths": known or mask.cu_seqlens is not None,
        "prefix": mask.prefix is not None,
        "sink": call.sink is not None,
        "softcap": call.softcap != 0,
        "tree": mask.is_tree,
        "window": left is not None,
    }
    direction = "train" if rules.wants_gradient(call.q, call.k, call.v, call.sink) else "infer"
    return direction, *(name for name, present in has.items() if present)


def measured_why_not(call: AttentionCall, name: str, kind: tuple[str, ...]) -> str | None:
    """The row in which a backend that ``auto`` may take instead was faster."""
    rows, tokens, _, width = call.q.shape
    target, sizes = target_of(call.q.device), (width, tokens, rows)
    return measured.slower("attention", name, target, kind, sizes, lambda rival: _may_run(rival, call))


def _measured_or_no_mask(call: AttentionCall, name: str) -> str | None:
    """Where the backend was not measured in calls like this, torch's own kernel is taken if it needs no mask."""
    kind = measured_kind(call)
    if measured.known("attention", target_of(call.q.device), kind, name):
        return measured_why_not(call, name, kind)
    return NO_MASK if needs_no_mask(call) else None


def _may_run(rival: str, call: AttentionCall) -> bool:
    """Whether ``auto`` may take it instead.  FlexAttention compiles for each mask and shape: it is no rival."""
    if rival == "fa4":
        return fa4_why_not(call) is None and not _waits(call)
    if rival in ("triton", "gluon"):
        return (triton_why_not if rival == "triton" else gluon_why_not)(call) is None
    return rival == "sdpa" and needs_no_mask(call)


# Triton


def triton_why_not(call: AttentionCall) -> str | None:
    if is_invariant():
        return device_documents.mask_why_not(call.q, call.k, call.v, call.mask, call.sizes, call.scale, call.sink)
    if call.q.shape[3] > rules.WIDEST_HEAD or call.v.shape[3] > rules.WIDEST_HEAD:
        return rules.NEEDS_NARROW_HEADS
    if call.q.dtype not in (torch.float32, *rules.HALF):
        return rules.NEEDS_TRITON_DTYPE
    if call.q.shape[0] * call.q.shape[2] > rules.MOST_HEADS_OF_ROWS:
        return rules.NEEDS_FEW_HEADS_OF_ROWS
    return rules.triton_why_not(call.q, call.k, call.v, call.sink)


def triton_not_worth(call: AttentionCall) -> str | None:
    if (rule := _measured_or_no_mask(call, "triton")) is not None:
        return rule
    return rules.triton_not_worth(call.q)


# Gluon, for Hopper

GLUON_WIDTHS = (64, 128)

NO_OPERATOR = "it is no operator that a graph could hold, and operators are being traced or recorded"


def gluon_why_not(call: AttentionCall) -> str | None:
    target = target_of(call.q.device)
    if target.kind != "cuda" or target.arch != 90:
        return "its kernels are made of instructions that only sm_90 has"
    if torch.compiler.is_compiling() or rules.records_operators():
        return NO_OPERATOR
    if call.q.shape[3] not in GLUON_WIDTHS or call.v.shape[3] not in GLUON_WIDTHS:
        return "takes heads of 64 and 128"
    if call.q.dtype not in rules.HALF:
        return "takes float16 and bfloat16"
    if call.softcap == 0 and call.scale is not None and call.scale <= 0:
        return "takes scales above 0: it compares scores before they are scaled"
    if call.mask.is_tree and call.mask.row_bounds(call.sizes).q_end is not None:
        return "goes by intervals of keys: a tree has none"
    if call.is_empty:
        return "needs at least one query and one key"
    if triton_version() < (3, 6):
        return "needs Triton 3.6 or later"
    return rules.triton_why_not(call.q, call.k, call.v, call.sink)


NOT_MEASURED = "no call like this one was measured with these kernels"


def gluon_not_worth(call: AttentionCall) -> str | None:
    kind = measured_kind(call)
    if not measured.known("attention", target_of(call.q.device), kind, "gluon"):
        return NOT_MEASURED
    return measured_why_not(call, "gluon", kind)


# flash-attn-4 and PyTorch's varlen_attn


def _trace_rule(call: AttentionCall) -> str | None:
    """What every kernel of a package asks of the call."""
    if torch.compiler.is_compiling():
        return "torch.compile is tracing: lengths are read on the host"
    if rules.inside_functorch():
        return rules.INSIDE_FUNCTORCH
    return "needs at least one query and one key" if call.is_empty else None


def _is_one_op(call: AttentionCall, form: str) -> bool:
    """Whether flash-attn-4 is an op in a graph: torch_op_fa4.py."""
    plain = form == "band" and call.sink is None and not call.may_have_padding and not call.is_empty
    return plain and torch.compiler.is_compiling() and not rules.inside_functorch()


def _packing_rule(call: AttentionCall) -> str | None:
    """What every kernel with cumulative lengths asks of the call."""
    return _trace_rule(call) or call.mask.row_varlen_why_not(call.sizes)


WAITS = "documents and prefixes as packed lengths: reading them waits for the device"


BAND_SINK_WIDTHS = (64, 128)
PACKED_WIDTHS = (24, 32, 64, 96, 128, 192, 256)
LIST_WIDTHS = (64, 96, 128, 192, 256)
NOT_COMPARED = (
    "flash-attn-4's gradients of packed lengths are right with heads of 24, 32, 64, 96, 128, 192 and 256, wrong with "
    "8, 16, 48, 80 and 112; those by lists of tiles were compared with heads of 64, 96, 128, 192 and 256, those of a "
    "sink with heads of 64 and 128, without packed lengths"
)
"""On an H200 with flash-attn-4 4.0.0b36, by ``tests/kernels/attention/test_attention_packages.py`` and the cases."""

ANY_ORDER = (
    "torch.use_deterministic_algorithms is on, and flash-attn-4 adds up gradients of queries in any order where it "
    "goes by lists of tiles"
)

LARGEST_LISTS = 1 << 30
"""Bytes of the lists of tiles: 16 for each pair of tiles."""


def fa4_form(call: AttentionCall) -> str:
    """How flash-attn-4 is told the mask.

    ``band``: by its own arguments; ``packed``: by packed lengths that the host knows, or has to read where nothing else
    is left; ``lengths``: by packed lengths that were given on the device; ``lists``: by lists of tiles.
    """
    mask, sizes = call.mask, call.sizes
    if mask.row_varlen_why_not(sizes) is None:
        if mask.is_band:
            return "band"
        if call.sink is None and mask.lengths_are_known(sizes):  # a sink's gradient was compared by lists
            return "packed"
        if call.sink is None and mask.cu_seqlens is not None and sizes.batch == 1:
            return "lengths"
    return "packed" if _lists_why_not(call) else "lists"


def fa4_tile(width: int) -> tuple[int, int]:
    """Queries and keys of a tile of the lists: the package's own tiles at this head size, forward and backward."""
    return 128, 128 if width <= 128 else 96 if width <= 192 else 64


def _lists_why_not(call: AttentionCall) -> str | None:
    if target_of(call.q.device).arch != 90:
        return "lists of tiles have run on sm_90 alone"
    if call.q.shape[3] not in LIST_WIDTHS:
        return "lists of tiles were compared with heads of 64, 96, 128, 192 and 256 alone"
    rows, (q_block, kv_block) = call.sizes.rows, fa4_tile(call.q.shape[3])
    if 16 * rows * -(-call.q.shape[1] // q_block) * -(-call.k.shape[1] // kv_block) > LARGEST_LISTS:
        return f"lists of tiles are not made where they are larger than {LARGEST_LISTS} bytes"
    return None


def fa4_why_not(call: AttentionCall) -> str | None:
    target = target_of(call.q.device)
    if target.kind != "cuda":
        return rules.NEEDS_CUDA
    if call.q.dtype not in rules.HALF:
        return "flash-attn-4 takes float16 and bfloat16"
    support = support_of(target.arch)
    if support is None:
        return "flash-attn-4 does not know this architecture"
    if call.sink is not None and not support.sink:
        return "flash-attn-4 has no sink on this architecture"
    if not support.takes_head_size(call.q.shape[3]) or call.q.shape[3] != call.v.shape[3]:
        return "flash-attn-4 does not take these head sizes on this architecture"
    if (missing := fa4_package_why_not()) is not None:
        return missing
    form = fa4_form(call)
    if (rule := None if _is_one_op(call, form) else _trace_rule(call)) is not None:
        return rule
    if rules.wants_gradient(call.q, call.k, call.v, call.sink):
        if not _gradients_were_compared(call, form):
            return NOT_COMPARED
        if form == "lists" and torch.are_deterministic_algorithms_enabled():
            return ANY_ORDER
    return call.mask.row_varlen_why_not(call.sizes) if form == "packed" else None


def _gradients_were_compared(call: AttentionCall, form: str) -> bool:
    width = call.q.shape[3]
    if form == "band":
        return call.sink is None or width in BAND_SINK_WIDTHS
    if form == "lists":
        return width in (LIST_WIDTHS if call.sink is None else BAND_SINK_WIDTHS)
    return call.sink is None and width in PACKED_WIDTHS


def fa4_details(call: AttentionCall) -> tuple[tuple[str, str], ...]:
    return (("mask_lowering", fa4_form(call)),)


def _waits(call: AttentionCall) -> bool:
    """Whether flash-attn-4 would need lengths that only the device knows."""
    return fa4_form(call) == "packed" and not call.mask.lengths_are_known(call.sizes)


def fa4_not_worth(call: AttentionCall) -> str | None:
    return WAITS if _waits(call) else measured_why_not(call, "fa4", measured_kind(call))


def varlen_why_not(call: AttentionCall) -> str | None:
    if call.with_lse:
        return "varlen_attn's log-sum-exp has no gradient"
    if target_of(call.q.device).kind != "cuda":
        return rules.NEEDS_CUDA
    if not takes_windows():
        return "needs a PyTorch whose varlen_attn takes windows and grouped heads (2.12)"
    if call.q.dtype not in rules.HALF:
        return "varlen_attn takes float16 and bfloat16"
    if call.softcap != 0:
        return "varlen_attn has no softcap"
    if call.sink is not None:
        return "varlen_attn has no sink"
    width = call.q.shape[3]
    if width != call.v.shape[3] or width > rules.WIDEST_HEAD or width % 8:
        return "varlen_attn takes one head size, a multiple of 8 up to 256"
    return _packing_rule(call)


def varlen_not_worth(call: AttentionCall) -> str:
    return WAITS


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def takes_windows() -> bool:
    return {"window_size", "enable_gqa", "scale"} <= _varlen_parameters()


takes_windows._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see dispatch.py

# FlexAttention


def flex_why_not(call: AttentionCall) -> str | None:
    if target_of(call.q.device).kind not in ("cuda", "hip"):
        return "needs a CUDA device: FlexAttention has no backward on a CPU"
    if not has_package("triton"):
        return "needs the triton package (pip install triton)"
    if rules.inside_functorch():
        return rules.INSIDE_FUNCTORCH
    if call.q.dtype not in (torch.float32, *rules.HALF):
        return rules.NEEDS_TRITON_DTYPE
    if not all(16 <= x.shape[3] <= rules.WIDEST_HEAD for x in (call.q, call.v)):
        return "needs head sizes from 16 to 256"
    if call.mask.is_tree and call.q.shape[1] > DENSE_LIMIT:
        return "in a tree of over 8192 queries it would compare every pair to tell what is not finite"
    return "needs at least one query and one key" if call.is_empty else None


def flex_not_worth(call: AttentionCall) -> str | None:
    return _measured_or_no_mask(call, "flex")

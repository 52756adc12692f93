"""Who may call ``attention``, and who may answer."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from kernel_index.core import native, rules
from kernel_index.core.fa4_support import support_of
from kernel_index.core.rules import inside_functorch
from kernel_index.core.target import has_package, target_of
from kernel_index.masks.attention_arguments import host_plan_why_not, sizes_of
from kernel_index.masks.doc_window_mask import lowerings
from kernel_index.masks.doc_window_mask.contract import DENSE_LIMIT
from kernel_index.masks.doc_window_mask.intervals import Sizes
from kernel_index.masks.doc_window_mask.mask import MaskContract


def lowering(sizes: Sizes, mask: MaskContract) -> str:
    """What torch's attention needs for this mask: ``none``, ``is_causal`` or ``dense``."""
    if not mask.has_tensors:
        left, right = mask.reach_within(sizes)
        if left is None and right is None:
            return "none"
        # torch's flag is aligned top-left, so it means offset 0; it is used for the square case alone.
        if left is None and right == 0 and sizes.offset == 0 and sizes.queries == sizes.keys:
            return "is_causal"
    return "dense"


def sdpa_details(q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, *_: Any) -> tuple[tuple[str, str], ...]:
    return (("mask_lowering", lowering(sizes_of(q, k, mask), mask)),)


def sdpa_why_not(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, scale: float | None, softcap: float, sink: Tensor | None
) -> str | None:
    if softcap != 0:
        return "scaled_dot_product_attention has no softcap"
    if sink is not None:
        return "scaled_dot_product_attention has no sink"
    sizes = sizes_of(q, k, mask)
    if sizes.queries > DENSE_LIMIT and lowering(sizes, mask) == "dense":
        return "dense_mask_too_large: this mask needs its dense form, which is refused above 8192 queries"
    return None


def sdpa_no_lse(*_: Any) -> str:
    return "scaled_dot_product_attention returns no log-sum-exp"


WIDEST = 256


def triton_why_not(q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, *rest: Any) -> str | None:
    if q.shape[3] > WIDEST or v.shape[3] > WIDEST:
        return "needs head sizes of at most 256"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "needs float32, bfloat16 or float16"
    return rules.triton_why_not(q, k, v, *rest)


def triton_not_worth(q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, *rest: Any) -> str | None:
    if needs_no_mask(q, k, v, mask, *rest):
        return "torch's own kernel needs no mask here"
    return rules.triton_not_worth(q)


HALF = (torch.float16, torch.bfloat16)


def fa4_why_not(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, scale: float | None, softcap: float, sink: Tensor | None
) -> str | None:
    target = target_of(q.device)
    if target.kind != "cuda":
        return "needs CUDA tensors"
    if not has_package("flash_attn"):
        return "needs the flash-attn-4 package (pip install flash-attn-4)"
    if q.dtype not in HALF:
        return "flash-attn-4 takes float16 and bfloat16"
    if sink is not None:
        return "flash-attn-4 has no gradient of the sink"
    support = support_of(target.arch)
    if support is None:
        return "flash-attn-4 does not know this architecture"
    if not support.takes_head_size(q.shape[3]) or q.shape[3] != v.shape[3]:
        return "flash-attn-4 does not take these head sizes on this architecture"
    if mask.has_tensors and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return PACKED_BACKWARD
    return _packing_rule(q, k, mask)


# Run on an H100 on 2026-11-24 with 4.0.0b36: outputs right, gradients of q, k and v wrong by a factor, where the same
# packing around the reference is right to float64 (tests/attention/test_attention_packages.py).
PACKED_BACKWARD = "flash-attn-4 4.0.0b36 gives wrong gradients for packed documents (run on an H100)"


def fa4_not_worth(q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, *_: Any) -> str | None:
    return WAITS if mask.has_tensors else None


WAITS = "documents and prefixes as packed lengths: reading them waits for the device"


def _packing_rule(q: Tensor, k: Tensor, mask: MaskContract) -> str | None:
    """What every kernel with cumulative lengths asks of the call."""
    if torch.compiler.is_compiling():
        return "torch.compile is tracing: lengths are read on the host"
    if inside_functorch():
        return "inside a torch.func transform"
    if q.shape[0] * q.shape[1] * k.shape[1] == 0:
        return "needs at least one query and one key"
    return lowerings.varlen_why_not(sizes_of(q, k, mask), mask.has_tensors)


def flex_why_not(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> str | None:
    if target_of(q.device).kind not in ("cuda", "hip"):
        return "needs a CUDA device: FlexAttention has no backward on a CPU"
    if not has_package("triton"):
        return "needs the triton package (pip install triton)"
    if inside_functorch():
        return "inside a torch.func transform"
    if q.dtype not in (torch.float32, *HALF):
        return "needs float32, bfloat16 or float16"
    if not (16 <= q.shape[3] <= WIDEST and 16 <= v.shape[3] <= WIDEST):
        return "needs head sizes from 16 to 256"
    if q.shape[0] * q.shape[1] * k.shape[1] == 0:
        return "needs at least one query and one key"
    return None


def flex_not_worth(q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, *rest: Any) -> str | None:
    if needs_no_mask(q, k, v, mask, *rest):
        return "torch's own kernel needs no mask here"
    return None


def varlen_why_not(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, scale: float | None, softcap: float, sink: Tensor | None
) -> str | None:
    if target_of(q.device).kind != "cuda":
        return "needs CUDA tensors"
    if not takes_windows():
        return "needs a PyTorch whose varlen_attn takes windows and grouped heads (2.12)"
    if q.dtype not in HALF:
        return "varlen_attn takes float16 and bfloat16"
    if softcap != 0:
        return "varlen_attn has no softcap"
    if sink is not None:
        return "varlen_attn has no sink"
    if q.shape[3] != v.shape[3] or q.shape[3] > WIDEST or q.shape[3] % 8:
        return "varlen_attn takes one head size, a multiple of 8 up to 256"
    return _packing_rule(q, k, mask)


def varlen_not_worth(*_: Any) -> str:
    return WAITS


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def takes_windows() -> bool:
    return {"window_size", "enable_gqa", "scale"} <= _varlen_parameters()


def lse_of_varlen(*_: Any) -> str:
    return "varlen_attn's log-sum-exp has no gradient"


def cpu_why_not(q: Tensor, *_: Any) -> str | None:
    return host_plan_why_not(q)


def native_why_not(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, scale: float | None, softcap: float, sink: Tensor | None
) -> str | None:
    if (rule := cpu_why_not(q)) is not None:
        return rule
    if q.shape[3] % 2 or v.shape[3] % 2 or v.shape[3] == 0:
        return "needs even head sizes: bfloat16 is multiplied in pairs"
    return native.why_not(*(t for t in (q, k, v, sink) if t is not None))


FEW_QUERIES, FEW_SCORES = 64, 128 * 128
TOO_FEW = "too few scores for tiles of 64 queries to pay"


def native_not_worth(q: Tensor, k: Tensor, *_: Any) -> str | None:
    few = q.shape[1] < FEW_QUERIES or q.shape[1] * k.shape[1] < FEW_SCORES
    return TOO_FEW if few else None


SMALL = 256 * 256


def cpu_not_worth(q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, *rest: Any) -> str | None:
    if needs_no_mask(q, k, v, mask, *rest):
        return "torch's own kernel needs no mask here"
    return cpu_lse_not_worth(q, k)


def cpu_lse_not_worth(q: Tensor, k: Tensor, *_: Any) -> str | None:
    return "too small for skipping to pay" if q.shape[1] * k.shape[1] <= SMALL else None


def needs_no_mask(q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, *rest: Any) -> bool:
    """Whether ``sdpa`` takes the call, and without a dense mask."""
    return sdpa_why_not(q, k, v, mask, *rest) is None and lowering(sizes_of(q, k, mask), mask) != "dense"

"""Backend-name aliases of MoBA, their resolution, and the receipt fields that report it."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core.dispatch import Backend, Choice, choose
from kernel_index.core.target import fa4_package_why_not, target_of
from kernel_index.core.triton.launch import interpreting

FLASH_UNAVAILABLE = "flash_cute_runtime_unavailable"
NAMES = ("triton", "flash", "native", "cpu", "reference")


class BlockSparseBackend(NamedTuple):
    """``requested`` as the caller wrote it, ``actual`` the backend that is tried first, and why the two differ.

    ``fallback_reason`` is empty where they do not differ.

    >>> import kernel_index as ki
    >>> ki.resolve_block_sparse_backend("reference").actual
    'reference'
    """

    requested: str | None
    actual: str
    fallback_reason: str


def resolve_block_sparse_backend(requested: str | None = "auto") -> BlockSparseBackend:
    """The backend that a name means on this machine, before any call is looked at.

    ``auto``, in any case, an empty name and None mean ``triton``.  ``flash`` is FlexAttention with its FlashAttention-4
    kernels; without them it is ``triton``, and the reason says so.  The call itself decides whether that backend can
    run it, and its receipt tells: on a CPU ``auto`` goes on to the CPU's own kernel.

    Args:
        requested: ``auto``, ``triton``, ``flash``, ``cpu`` or ``reference``.

    Returns:
        ``BlockSparseBackend(requested, actual, fallback_reason)``.

    Raises:
        TypeError: the name is neither a string nor None.
        ValueError: the name is unknown.

    Source: the resolver of blockized sparse decoding in the index's samples.

    >>> import kernel_index as ki
    >>> ki.resolve_block_sparse_backend("AUTO")
    BlockSparseBackend(requested='AUTO', actual='triton', fallback_reason='')
    """
    name = normalized(requested)
    if name == "auto":
        return BlockSparseBackend(requested, "triton", "")
    if name not in NAMES:
        raise ValueError(f"requested must be auto or one of {', '.join(NAMES)}, got {requested!r}")
    if name == "flash" and not _flash_runtime(torch.cuda.is_available() and torch.version.hip is None):
        return BlockSparseBackend(requested, "triton", FLASH_UNAVAILABLE)
    return BlockSparseBackend(requested, name, "")


def normalized(requested: Any) -> str:
    if requested is not None and not isinstance(requested, str):
        raise TypeError(f"backend must be a string or None, got {type(requested).__name__}")
    return (requested or "auto").strip().lower() or "auto"


def _flash_runtime(cuda: bool) -> bool:
    """Whether FlexAttention can call FlashAttention-4's kernels: a CUDA device and the package."""
    return cuda and fa4_package_why_not() is None


def flash_runtime_why_not(q: Tensor) -> str | None:
    return None if _flash_runtime(target_of(q.device).kind == "cuda") else FLASH_UNAVAILABLE


def pick(op: str, backends: tuple[Backend, ...], flash: Backend | None, requested: Any, call: Any) -> Choice:
    """``choose`` with this family's names and telemetry.

    ``flash`` is the one name that may fall back: where it cannot run, the others are tried in their order.
    """
    name = normalized(requested)
    if name == "flash":
        backends, name = (backends if flash is None else (flash, *backends)), "auto"
    choice = choose(op, backends, name, call)
    ran, reason = choice.backend.name, ""
    if normalized(requested) == "flash" and ran != "flash":
        reason = dict(choice.declined).get("flash", FLASH_UNAVAILABLE)
    elif normalized(requested) == "auto" and ran != "triton":
        reason = dict(choice.declined).get("triton", "")
    telemetry = (
        ("semantic_branch", "block_sparse"),
        ("router_type", "moba"),
        ("requested_backend", requested),
        ("requested_backend_source", _source(choice, requested)),
        ("actual_backend", ran),
        ("runtime_mode", _runtime_mode(call.q, ran)),
        ("fallback_reason", reason),
    )
    asked = "auto" if requested is None else requested
    return replace(choice, requested=asked, details=(*telemetry, *choice.details))


def _source(choice: Choice, requested: Any) -> str:
    if choice.forced_by is not None:
        return choice.forced_by
    return "default" if normalized(requested) == "auto" else "argument"


def _runtime_mode(q: Tensor, backend: str) -> str:
    kind = target_of(q.device).kind
    if kind == "cpu" and backend == "triton" and interpreting():
        return "blockized_sparse_interpreted"
    return f"blockized_sparse_{kind}"

"""Proof that flash-attn-4 ran here and was right, or what stood in the way."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernel_index.kernels.attention.dense_fa4_execute_proof.request import DTYPES, ProofRequest, ProofShape
from kernel_index.kernels.attention.dense_fa4_execute_proof.runner import prove
from kernel_index.kernels.attention.dense_fa4_execute_proof.verify import problems


@dataclass(frozen=True)
class Refusal:
    """Why a proof was not attempted: ``code`` is ``package_missing``; ``reason`` is a sentence."""

    code: str
    reason: str


@dataclass(frozen=True)
class Proof:
    """What a proof came to.

    ``state`` is how far it got: ``planned``, ``compiled`` (ahead of time, no device) or ``executed``.  ``passed`` is
    true only for ``executed`` with every condition met; ``problems`` names the others; ``receipt`` holds the facts.

    >>> import kernel_index as ki
    >>> planned = {"state": "planned"}
    >>> ki.Proof("planned", False, None, ("state is 'planned', not 'executed'",), planned).passed
    False
    """

    state: str
    passed: bool
    refusal: Refusal | None
    problems: tuple[str, ...]
    receipt: dict[str, Any]


def fa4_execute_proof(
    shape: ProofShape | tuple[int, int, int, int, int] = ProofShape(),  # noqa: B008 -- a tuple, immutable
    *,
    dtype: torch.dtype | str = torch.bfloat16,
    causal: bool = True,
    seed: int = 0,
    time_limit: float = 600.0,
    out: Path | str | None = None,
) -> Proof:
    """Run flash-attn-4 forward and backward in a process of its own, and judge every number it returns.

    On a CUDA device the program executes; elsewhere it compiles the package's kernels for sm_90a and sm_100a; without
    the package it is refused.  For the output and each gradient, with ``exact`` in float32 and ``plain`` the same
    formula in the inputs' dtype, FlashAttention's own rule must hold::

        max |actual - exact| ≤ 2 · max |plain - exact| + 2 · max |x + 0.3 - 0.3 - x|,   x = exact in that dtype

    A crash, a hang, NaN, a kernel that the profiler did not see or a missing version are all failures, with a receipt.

    Args:
        shape: (batch, seq, heads, kv_heads, head_dim).
        dtype: bfloat16 or float16.
        causal: with the causal mask.
        seed: of the inputs.
        time_limit: seconds for each process.
        out: where the JSON receipt is written, on failure too; None keeps it in the result only.

    Returns:
        ``Proof``; ``passed`` is true only for a proof that ``kernel-index prove --verify`` accepts.

    Raises:
        TypeError, ValueError: the request itself is not one that the kernel could ever serve.

    Source: the error rule of FlashAttention's own tests (Dao, 2023).

    >>> import kernel_index as ki
    >>> try:
    ...     ki.fa4_execute_proof((1, 128, 4, 3, 64))
    ... except ValueError as error:
    ...     print(error)
    heads must be a multiple of kv_heads (3), got 4
    """
    name = next((n for n, d in DTYPES.items() if dtype in (n, d)), str(dtype))
    request = ProofRequest(ProofShape(*shape), name, causal, seed)
    mode = "execute" if torch.cuda.is_available() and torch.version.hip is None else "compile"
    receipt = prove(request, mode=mode, time_limit=time_limit, out=None if out is None else Path(out))
    return proof_of(receipt)


def proof_of(receipt: dict[str, Any]) -> Proof:
    """A receipt as the caller sees it, judged once more."""
    refusal = None if receipt["refusal"] is None else Refusal(**receipt["refusal"])
    found = tuple(problems(receipt))
    return Proof(receipt["state"], not found, refusal, found, receipt)

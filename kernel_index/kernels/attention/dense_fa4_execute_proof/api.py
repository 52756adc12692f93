"""``fa4_execute_proof``: whether flash-attn-4 runs on this machine with correct results, or why not."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kernel_index.kernels.attention.dense_fa4_execute_proof.request import DTYPES, DtypeName, ProofRequest, ProofShape
from kernel_index.kernels.attention.dense_fa4_execute_proof.runner import prove
from kernel_index.kernels.attention.dense_fa4_execute_proof.verify import problems

ProofState = Literal["planned", "compiled", "executed"]


@dataclass(frozen=True)
class Refusal:
    """Why there is no proof: ``code`` is ``package_missing``; ``reason`` is a sentence."""

    code: Literal["package_missing"]
    reason: str


@dataclass(frozen=True)
class Proof:
    """The result of a proof.

    ``state`` is the last stage that it finished: ``planned``, ``compiled`` (ahead of time, without a device) or
    ``executed``.  ``passed`` is true only for ``executed`` with every condition met.  ``problems`` names the conditions
    that are not met; ``receipt`` holds what was recorded.

    >>> import kernel_index as ki
    >>> planned = {"state": "planned"}
    >>> ki.Proof("planned", False, None, ("state is 'planned', not 'executed'",), planned).passed
    False
    """

    state: ProofState
    passed: bool
    refusal: Refusal | None
    problems: tuple[str, ...]
    receipt: dict[str, Any]


def fa4_execute_proof(
    shape: ProofShape | tuple[int, int, int, int, int] = ProofShape(),  # noqa: B008 -- a tuple, immutable
    *,
    dtype: torch.dtype | DtypeName = torch.bfloat16,
    causal: bool = True,
    seed: int = 0,
    time_limit: float = 600.0,
    out: Path | str | None = None,
) -> Proof:
    """Run flash-attn-4 forward and backward in a separate process, and check every result against a reference.

    On a CUDA device the program executes; elsewhere it compiles the package's kernels for sm_90a and sm_100a.  Without
    the package the result has a ``refusal``.  For the output and each gradient, FlashAttention's own rule must hold,
    with ``exact`` computed in float32 and ``plain`` by the same formula in the inputs' dtype::

        max |actual - exact| ≤ 2 · max |plain - exact| + 2 · max |x + 0.3 - 0.3 - x|,   x = exact in that dtype

    A crash, a hang, NaN, a kernel that the profiler did not see or a missing version is a failure, with a receipt.

    Args:
        shape: (batch, seq, heads, kv_heads, head_dim).
        dtype: bfloat16 or float16.
        causal: whether the causal mask is applied.
        seed: seed of the random inputs.
        time_limit: seconds for each process.
        out: path of the JSON receipt, which is written on failure too; None writes no file.

    Returns:
        A ``Proof``; ``passed`` is true only if ``kernel-index prove --verify`` accepts the receipt.

    Raises:
        TypeError, ValueError: the kernel supports no such shape, dtype or seed on any machine.

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
    """The ``Proof`` of a receipt, whose conditions are checked again."""
    refusal = None if receipt["refusal"] is None else Refusal(**receipt["refusal"])
    found = tuple(problems(receipt))
    return Proof(receipt["state"], not found, refusal, found, receipt)

"""Hyper-connections: read a branch's input from four residual streams, merge its output back into them."""

from typing import Literal, NamedTuple

from torch import Tensor

from kernel_index.core import native, numerics
from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.core.stable import ELEMENTWISE, ON_A_GPU
from kernel_index.kernels.streams.mhc_fused_static import contract
from kernel_index.kernels.streams.mhc_fused_static.native import sinkhorn_native
from kernel_index.kernels.streams.mhc_fused_static.reference import mix_reference, sinkhorn_reference
from kernel_index.kernels.streams.mhc_fused_static.torch_op import mix_inductor, mix_native, mix_triton
from kernel_index.kernels.streams.mhc_fused_static.torch_op_sinkhorn import sinkhorn_triton

StreamsBackend = Literal["auto", "triton", "native", "inductor", "reference"]
SinkhornBackend = Literal["auto", "triton", "native", "reference"]

BACKENDS = (
    Backend("triton", contract.triton_why_not, mix_triton, contract.triton_not_worth, invariant=ON_A_GPU),
    Backend(
        "native",
        contract.native_why_not,
        mix_native,
        native.once_built(native.ROWS, not_worth=contract.native_not_worth),
        invariant=ELEMENTWISE,
    ),
    Backend("inductor", contract.inductor_why_not, mix_inductor, contract.inductor_not_worth),
    Backend("reference", always, mix_reference),
)

SINKHORN_BACKENDS = (
    Backend(
        "triton",
        contract.triton_sinkhorn_why_not,
        sinkhorn_triton,
        contract.triton_sinkhorn_not_worth,
        invariant=ON_A_GPU,
    ),
    Backend("native", contract.native_sinkhorn_why_not, sinkhorn_native, numerics.not_worth, invariant=ELEMENTWISE),
    Backend("reference", always, sinkhorn_reference),
)


class StreamsAndBranchInput(NamedTuple):
    """The streams after a merge, and the next branch's input.

    >>> import torch, kernel_index as ki
    >>> hidden, ones = torch.zeros(1, 1, 4, 2), torch.ones(4)
    >>> pair = ki.mhc_merge_and_branch_input(hidden, torch.ones(1, 1, 2), ones, torch.eye(4), ones / 4)
    >>> pair.branch_input
    tensor([[[1., 1.]]])
    """

    hidden: Tensor
    branch_input: Tensor


def _mixed(op: str, backend: StreamsBackend, call: contract.Call) -> tuple[Tensor, ...]:
    rows = contract.by_rows(call)
    found = choose(op, BACKENDS, backend, rows).run(rows)
    if rows is call:
        return found
    return tuple(t.view(*call.hidden.shape[:2], *t.shape[2:]) for t in found)


def mhc_branch_input(hidden: Tensor, h_pre: Tensor, *, backend: StreamsBackend = "auto") -> Tensor:
    """The input of a branch: a weighted sum of the residual streams.

    ``branch_input = Σ_n h_pre[n] · hidden[n]``, summed in float32 (float64 if an argument is) and rounded once.

    Args:
        hidden: the streams, [B, T, 4, C], any floating dtype.  Other numbers of streams and other leading dimensions
            [..., streams, C] are served by the reference.
        h_pre: [4], or [B, 4] with one row for each batch row, or [B, T, 4] with one for each token; float32 for the
            fused backends.  Its rank alone tells which.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        [B, T, C] of hidden's dtype, contiguous.  Differentiable twice; the gradient of h_pre is deterministic.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: the shapes or devices differ.
        Ineligible: the named backend cannot run this call.

    Source: Zhu et al., "Hyper-Connections", 2024; Xie et al., "mHC: Manifold-Constrained Hyper-Connections", 2025.

    >>> import torch, kernel_index as ki
    >>> hidden = torch.arange(8.0).view(1, 1, 4, 2)
    >>> ki.mhc_branch_input(hidden, torch.tensor([1.0, 0.0, 0.0, 1.0]))
    tensor([[[6., 8.]]])
    """
    call = contract.check(hidden, None, None, None, h_pre, merges=False)
    return _mixed("mhc_branch_input", backend, call)[0]


def mhc_merge(
    hidden: Tensor, branch_out: Tensor, h_post: Tensor, h_res: Tensor, *, backend: StreamsBackend = "auto"
) -> Tensor:
    """Mix the residual streams among each other and add a branch's output to each.

    ``out[o] = Σ_n h_res[o, n] · hidden[n] + h_post[o] · branch_out``, summed in float32 (float64 if an argument is)
    and rounded once.  h_res is indexed by the stream that is written, then by the one that is read.

    Args:
        hidden: the streams, [B, T, 4, C], any floating dtype.
        branch_out: [B, T, C], any floating dtype.
        h_post: [4], [B, 4] or [B, T, 4].
        h_res: [4, 4], [B, 4, 4] or [B, T, 4, 4].  The rank of each coefficient alone says which: ``mhc_branch_input``.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        The new streams, of hidden's shape and dtype, contiguous.  Differentiable twice; coefficient gradients are
        summed deterministically.  hidden and branch_out are kept for backward only if a coefficient needs a gradient.

    Raises:
        TypeError, ValueError, Ineligible: as ``mhc_branch_input``.

    Source: Zhu et al., "Hyper-Connections", 2024; Xie et al., "mHC: Manifold-Constrained Hyper-Connections", 2025.

    >>> import torch, kernel_index as ki
    >>> hidden, swap = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 4, 1), torch.eye(4)[[1, 0, 2, 3]]
    >>> ki.mhc_merge(hidden, torch.full((1, 1, 1), 10.0), torch.ones(4), swap).flatten()
    tensor([12., 11., 13., 14.])
    """
    call = contract.check(hidden, branch_out, h_post, h_res, None, reads=False)
    return _mixed("mhc_merge", backend, call)[0]


def mhc_merge_and_branch_input(
    hidden: Tensor,
    branch_out: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    h_pre: Tensor,
    *,
    backend: StreamsBackend = "auto",
) -> StreamsAndBranchInput:
    """``mhc_merge`` and the next branch's ``mhc_branch_input`` in one pass over memory: 10·C elements, not 14·C.

    ``new[o] = Σ_n h_res[o, n] · hidden[n] + h_post[o] · branch_out``, then ``branch_input = Σ_n h_pre[n] · new[n]``
    of the new streams before they are rounded: in float32 the result of the two calls, below it nearer to the truth.

    Args:
        hidden: the streams, [B, T, 4, C], any floating dtype.
        branch_out: [B, T, C], any floating dtype.
        h_post: [4], [B, 4] or [B, T, 4]: of the branch that is merged.
        h_res: [4, 4], [B, 4, 4] or [B, T, 4, 4].
        h_pre: [4], [B, 4] or [B, T, 4]: of the branch that comes next.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        ``(hidden, branch_input)``, both of hidden's dtype and contiguous.  An output that is not used costs nothing in
        backward.

    Raises:
        TypeError, ValueError, Ineligible: as ``mhc_branch_input``.

    Source: the cross-layer fusion is this library's; the mixing as in ``mhc_merge``.

    >>> import torch, kernel_index as ki
    >>> hidden, out = torch.ones(1, 1, 4, 2), torch.full((1, 1, 2), 2.0)
    >>> ki.mhc_merge_and_branch_input(hidden, out, torch.ones(4), torch.eye(4), torch.full((4,), 0.25)).branch_input
    tensor([[[3., 3.]]])
    """
    call = contract.check(hidden, branch_out, h_post, h_res, h_pre)
    return StreamsAndBranchInput(*_mixed("mhc_merge_and_branch_input", backend, call))


def sinkhorn(
    logits: Tensor,
    iters: int = 20,
    temperature: float = 1.0,
    eps: float = 1e-8,
    *,
    eps_in: Literal["sums", "elements"] = "sums",
    backend: SinkhornBackend = "auto",
) -> Tensor:
    """A doubly stochastic matrix: Sinkhorn's alternating normalisation of ``exp(logits / temperature)``.

    ``iters`` times: ``M ← M / (row sums + eps)``, then ``M ← M / (column sums + eps)``.  It is computed on
    logarithms, in float32 at least, so that no exponential overflows or vanishes on the way.

    ``eps_in="elements"`` is the convention of DeepSeek's and Liger's kernels, for models that were trained with it:
    ``M ← softmax(logits / temperature) + eps`` over each row, ``M ← M / (column sums + eps)``, then ``iters − 1`` times
    rows and columns as above.

    Args:
        logits: [..., n, n], any floating dtype.
        iters: repetitions, at least 1.
        temperature: positive; a small one sharpens the matrix.
        eps: added to each sum; 0 is allowed, and makes both conventions equal.
        eps_in: ``"sums"``, or ``"elements"`` to add it once to each element, too.
        backend: ``"auto"`` or a backend's name.

    Returns:
        [..., n, n], float32 (float64 for float64 logits).  Columns add up to 1; so do rows, once it has converged.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
        Ineligible: the named backend cannot run this call.

    Source: Sinkhorn and Knopp, "Concerning nonnegative matrices and doubly stochastic matrices", 1967.

    >>> import torch, kernel_index as ki
    >>> ki.sinkhorn(torch.zeros(2, 2))
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    contract.check_sinkhorn(logits, iters, temperature, eps, eps_in)
    call = (logits, iters, temperature, eps, eps_in)
    return choose("sinkhorn", SINKHORN_BACKENDS, backend, *call).run(*call)

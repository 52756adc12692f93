"""Attention to exactly the selected tokens, with a receipt that says whether it stayed sparse."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from kernel_index.core import device_documents, numerics
from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.core.document_attention import ATTENTION
from kernel_index.core.numerics import is_invariant
from kernel_index.kernels.attention.dense_attention.api import BACKENDS as DENSE
from kernel_index.kernels.attention.dense_attention.api import AttentionCall, AttentionOutput
from kernel_index.kernels.attention.exact_token_sparse import contract
from kernel_index.kernels.attention.exact_token_sparse.contract import ExactTokenCall
from kernel_index.kernels.attention.exact_token_sparse.cpu import exact_token_cpu
from kernel_index.kernels.attention.exact_token_sparse.native import exact_token_native
from kernel_index.kernels.attention.exact_token_sparse.reference import exact_token_reference
from kernel_index.kernels.attention.exact_token_sparse.torch_op import exact_token_triton
from kernel_index.masks.attention_arguments import EVERYTHING_BEFORE, sizes_of
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.masks.prefix_tree.paths import along_paths
from kernel_index.routing.lightning_indexer.selection import TokenSelection


def _telemetry(
    name: str, earlier: tuple[Backend, ...], path: str, staging: str
) -> Callable[[ExactTokenCall], tuple[tuple[str, Any], ...]]:
    """The one schema of both branches."""
    rerouted = path == "reroute_to_full"

    def details(call: ExactTokenCall) -> tuple[tuple[str, Any], ...]:
        return (
            ("path", path),
            ("reason", contract.INDEXER_RETURNED_NONE if rerouted else ""),
            ("indexer", call.indexer),
            ("seq_len", None if torch.compiler.is_compiling() else call.q.shape[1]),  # a symbol while traced
            ("requested_backend", call.requested),
            ("actual_backend", name),
            ("runtime_mode", contract.runtime_mode(name)),
            ("fallback_reason", _why_not_earlier(earlier, call) if call.requested == "auto" else ""),
            ("staging", staging),
        )

    return details


def _why_not_earlier(earlier: tuple[Backend, ...], call: ExactTokenCall) -> str:
    """The rule that each backend breaks which "auto" would have preferred."""
    found = []
    for b in earlier:
        rule = b.why_not(call)
        if rule is None and b.not_worth is not None:
            rule = b.not_worth(call)
        found.append(f"{b.name}: {rule}")
    return "; ".join(found)


def _with_telemetry(table: tuple[Backend, ...], path: str, staging: dict[str, str]) -> tuple[Backend, ...]:
    return tuple(
        replace(b, details=_telemetry(b.name, table[:i], path, staging.get(b.name, "none")))
        for i, b in enumerate(table)
    )


ExactTokenBackend = Literal["auto", "triton", "cpu", "fa4", "flex", "varlen", "native", "sdpa", "reference"]
"""Without a selection dense attention runs, by any backend of ``attention``."""

BACKENDS = _with_telemetry(
    (
        Backend(
            "triton",
            contract.triton_why_not,
            exact_token_triton,
            contract.triton_not_worth,
            invariant=device_documents.ATTENTION,
        ),
        Backend("native", contract.native_why_not, exact_token_native, numerics.not_worth, invariant=ATTENTION),
        Backend("cpu", contract.cpu_why_not, exact_token_cpu),
        Backend("reference", always, exact_token_reference),
    ),
    "exact_token",
    {"triton": "fused", "cpu": "row_gather_pair"},
)


def _of_dense(function: Callable[[AttentionCall], Any]) -> Callable[[ExactTokenCall], Any]:
    """A rule or a backend of dense attention, for the same call without a selection."""

    def of_dense(call: ExactTokenCall) -> Any:
        return function(call.as_dense)

    return of_dense


REROUTED = _with_telemetry(
    tuple(
        replace(
            b,
            why_not=_of_dense(b.why_not),
            run=_of_dense(b.run),
            not_worth=None if b.not_worth is None else _of_dense(b.not_worth),
        )
        for b in DENSE
    ),
    "reroute_to_full",
    {},
)


def exact_token_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor | TokenSelection | None,
    *,
    indices_valid: Tensor | None = None,
    mask: MaskContract | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    backend: ExactTokenBackend = "auto",
) -> Tensor:
    """Softmax attention of each query over exactly the tokens that were selected for it and that the mask allows.

    With ``P(t)`` the tokens selected for query t and ``A(t)`` the keys that the mask allows::

        z[t, s] = scale · q[t]·k[s]          softcap · tanh(z / softcap)  with a softcap
        out[t]  = Σ_s softmax(z[t])[s] · v[s]          over s in P(t) ∩ A(t)

    A sink is one more term ``exp(sink[h])`` of the softmax's denominator.  A token counts once however often it is
    selected, and to select everything is dense attention.  A query left without a key gives exactly 0 and gradient 0.
    The gradient of q, k, v and sink is that of this formula, the same bits every time; the selection has none.

    Args:
        q: [B, T, H, D], any floating dtype.  Under autocast q, k and v are cast as those of
            ``F.scaled_dot_product_attention``.
        k: [B, S, K, D], q's dtype; H is a multiple of K.
        v: [B, S, K, Dv], q's dtype.
        indices: int32 or int64 [B, T, topk] for all heads, or [B, T, K, topk], each in [0, S) or −1 for none; or
            what ``lightning_indexer`` returned.  None: the indexer declined, so dense attention runs, and says so.
        indices_valid: bool of the shape of ``indices``; False where an entry selects nothing.
        mask: the keys that each query may attend to; causal by default.
        scale: factor of the scores; ``D ** -0.5`` by default.
        softcap: bound of the scores; 0 is off.
        sink: [H], learnable sink logits: terms of the denominator without a value; None for no such term.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        [B, T, H, Dv], contiguous, q's dtype.

    The receipt's details have one schema: ``path`` (``exact_token`` or ``reroute_to_full``), ``reason``
    (``indexer_returned_none`` where rerouted), ``indexer`` (where the selection comes from), ``seq_len`` (None inside
    torch.compile), ``requested_backend``, ``actual_backend``, ``runtime_mode`` (``eager``, ``compiled``,
    ``interpreted``), ``fallback_reason`` (what kept "auto" from the backends before) and ``staging`` (``fused`` in the
    kernel, ``row_gather_pair``, or ``none``).

    Raises:
        TypeError, ValueError: as ``attention``; or indices that are no integers, of another shape, or, where they lie
            on the host, neither −1 nor the index of a key.  On a device an index out of range selects nothing.
        Ineligible: the named backend cannot run this call.

    Source: DeepSeek-V3.2 sparse attention (DeepSeek-AI, 2025), for grouped heads; sink: gpt-oss.

    >>> import torch, kernel_index as ki
    >>> q = k = torch.zeros(1, 3, 1, 2)
    >>> v = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
    >>> selected = torch.tensor([[[0, -1], [0, 0], [0, 2]]])
    >>> with ki.receipts() as log:
    ...     ki.exact_token_attention(q, k, v, selected).flatten()
    tensor([1.0000, 1.0000, 3.5000])
    >>> log[0].details["path"], log[0].details["actual_backend"]
    ('exact_token', 'cpu')
    """
    mask = EVERYTHING_BEFORE if mask is None else mask
    call = contract.check(q, k, v, indices, indices_valid, mask, scale, softcap, sink, backend, with_lse=False)
    return _attend("exact_token_attention", call, mask)[0]


def exact_token_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor | TokenSelection | None,
    *,
    indices_valid: Tensor | None = None,
    mask: MaskContract | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    backend: ExactTokenBackend = "auto",
) -> AttentionOutput:
    """``exact_token_attention`` together with the logarithm of its denominator.

    ``lse[h, t] = log(exp(sink[h]) + Σ_s exp(z[t, s]))`` with the natural logarithm.  A query left without a key gives
    −inf, also where there is a sink, and gradient 0.

    Args:
        q: as in ``exact_token_attention``, and so are the others.

    Returns:
        ``AttentionOutput(out [B, T, H, Dv], lse [B, H, T])``; both carry gradients.

    Raises:
        TypeError, ValueError, Ineligible: as ``exact_token_attention``.

    Source: as ``exact_token_attention``.

    >>> import torch, kernel_index as ki
    >>> x, selected = torch.zeros(1, 3, 1, 8), torch.tensor([[[0, -1], [0, 0], [0, 2]]])
    >>> ki.exact_token_attention_with_lse(x, x, x, selected).lse.exp()
    tensor([[[1., 1., 2.]]])
    """
    mask = EVERYTHING_BEFORE if mask is None else mask
    call = contract.check(q, k, v, indices, indices_valid, mask, scale, softcap, sink, backend, with_lse=True)
    return AttentionOutput(*_attend("exact_token_attention_with_lse", call, mask))


def _attend(op: str, call: ExactTokenCall, mask: MaskContract) -> tuple[Tensor, ...]:
    """``out``, and ``lse`` where the call asks for it.

    ``mask`` as it was given: of a tree the call holds what is left of it beside its selection.
    """
    if not (mask.is_tree and call.indices is not None and is_invariant()):
        found = choose(op, REROUTED if call.indices is None else BACKENDS, call.requested, call).run(call)
        return found if call.with_lse else found[:1]
    # A token's place is the one on its path.
    selected = call.indices if call.valid is None else torch.where(call.valid, call.indices, -1)
    selected = selected.expand(-1, -1, call.k.shape[2], -1)

    def attend_branch(
        q: Tensor, selected: Tensor, k: Tensor, v: Tensor, places: Tensor, mask: MaskContract
    ) -> tuple[Tensor, ...]:
        own = TokenSelection(selected, selected >= 0, selected).within(places)
        options = call.scale, call.softcap, call.sink, call.requested
        branch = contract.check(q, k, v, own.indices, own.valid, mask, *options, with_lse=call.with_lse)
        return _attend(op, branch, mask)

    places = torch.arange(call.k.shape[1], device=call.k.device).expand(call.k.shape[:2])
    by_query, by_key, sizes = (call.q, selected), (call.k, call.v, places), sizes_of(call.q, call.k, mask)
    return along_paths(op, attend_branch, mask, sizes, by_query, by_key, (1, 2), (0.0, -math.inf))

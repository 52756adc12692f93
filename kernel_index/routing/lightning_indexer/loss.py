"""What trains the indexer: its scores should say what attention does with the tokens."""

from typing import Literal

import torch
from torch import Tensor

from kernel_index.core import checks
from kernel_index.core.autocast import cast_like_sdpa, without_autocast
from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.masks.attention_arguments import scale_of
from kernel_index.routing.lightning_indexer import contract
from kernel_index.routing.lightning_indexer.contract import LossCall
from kernel_index.routing.lightning_indexer.selection import TokenSelection
from kernel_index.routing.lightning_indexer.torch_op import loss_triton

ELEMENTS = 1 << 22
"""Fetched numbers of a chunk of queries at once; 16 times as many on a GPU."""


LossBackend = Literal["auto", "triton", "reference"]


def loss_reference(call: LossCall) -> Tensor:
    """The formula, some queries at a time."""
    selection, q, k, scale, softcap = call
    with torch.no_grad(), without_autocast(q):
        target = attention_shares(selection, q.detach(), k.detach(), scale, softcap)
    scores = torch.where(selection.valid, selection.scores, -torch.inf)
    not_empty = selection.valid.any(-1, keepdim=True)
    log_shares = torch.where(not_empty, scores, 0.0).log_softmax(-1)  # a row of −∞ would be NaN, and so its gradient
    divergence = target * (target.clamp(min=torch.finfo(target.dtype).tiny).log() - log_shares)
    rows = torch.where(selection.valid & (target > 0), divergence, 0.0).sum(-1)
    return rows.sum() / not_empty.sum().clamp(min=1)


LOSS_BACKENDS = (
    Backend("triton", contract.triton_loss_why_not, loss_triton, contract.triton_loss_not_worth),
    Backend("reference", always, loss_reference),
)


def lightning_indexer_loss(
    selection: TokenSelection,
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    backend: LossBackend = "auto",
) -> Tensor:
    """How far the indexer's scores are from what attention does with the tokens that it selected.

    ::

        target[t] = mean over the heads of softmax(scale · q[t, h]·k[s])          over the tokens s selected for query t
        loss      = mean over the queries of KL(target[t] ‖ softmax(scores[t]))

    The target has no gradient: the loss trains the indexer alone; give the indexer detached inputs to stop the gradient
    there.  Queries without a token do not count; if no query has one the loss is 0.  With one token for each query both
    shares are 1: the loss is 0, and the indexer learns from ``topk`` of 2 or more.

    Args:
        selection: what ``lightning_indexer`` returned, its scores with their graph.
        q: [B, T, H, D], the queries of the attention over the selected tokens; autocast casts q and k.
        k: [B, S, K, D], its keys.
        scale: factor of the attention's scores; ``D ** -0.5`` by default.
        softcap: bound of the attention's scores; 0 is off.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        A scalar, float32 (float64 for float64).  Memory is O(T · topk) and one chunk of fetched keys.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
        Ineligible: the named backend cannot run this call.

    Source: the sparse training stage of DeepSeek-V3.2 (DeepSeek-AI, 2025).

    >>> import torch, kernel_index as ki
    >>> q_idx, k_idx = torch.ones(1, 3, 1, 2), torch.zeros(1, 3, 2)
    >>> selected = ki.lightning_indexer(q_idx, k_idx, torch.ones(1, 3, 1), topk=2)
    >>> ki.lightning_indexer_loss(selected, torch.zeros(1, 3, 4, 8), torch.zeros(1, 3, 2, 8))
    tensor(0.)
    """
    q, k = cast_like_sdpa(q, k)
    _check(selection, q, k, scale, softcap)
    call = LossCall(selection, q, k, scale_of(q, scale), softcap)
    return choose("lightning_indexer_loss", LOSS_BACKENDS, backend, call).run(call)


def attention_shares(selection: TokenSelection, q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """The attention weight of each selected token, its mean over the heads, [B, T, topk]; 0 where there is none."""
    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    shares = torch.zeros(selection.indices.shape, dtype=dtype, device=q.device)
    if keys == 0:
        return shares
    # One row for each token and KV head, so that the products need no other order.
    vectors = k.reshape(batch * keys * kv_heads, width)
    first = torch.arange(batch, device=q.device)[:, None, None] * keys
    head = torch.arange(kv_heads, device=q.device)[:, None]
    at_once = ELEMENTS if q.device.type == "cpu" else 16 * ELEMENTS
    step = max(1, at_once // max(1, batch * selection.indices.shape[2] * kv_heads * width))
    if torch.compiler.is_compiling():  # a loop over queries would make the graph one of a single length
        step = queries
    for t in (0,) if torch.compiler.is_compiling() else range(0, queries, step):
        at = slice(t, t + step)
        valid = selection.valid[:, at, None, None]
        row = ((selection.indices[:, at].long().clamp(min=0) + first) * kv_heads).unsqueeze(2) + head
        fetched = vectors.index_select(0, row.flatten()).view(*row.shape, width).to(dtype)
        q_BTKGD = q[:, at].to(dtype).unflatten(2, (kv_heads, heads // kv_heads))
        z = q_BTKGD @ fetched.transpose(-1, -2) * scale
        z = softcap * torch.tanh(z / softcap) if softcap else z
        z = z.masked_fill(~valid, -torch.inf).masked_fill(~valid.any(-1, keepdim=True), 0.0)
        shares[:, at] = z.softmax(-1).masked_fill(~valid, 0.0).mean((2, 3))
    return shares


def _check(selection: TokenSelection, q: Tensor, k: Tensor, scale: float | None, softcap: float) -> None:
    if not isinstance(selection, TokenSelection):
        raise TypeError(f"selection must be a TokenSelection, got {type(selection).__name__}")
    for name, value, legend in (("q", q, "[B, T, H, D]"), ("k", k, "[B, S, K, D]")):
        checks.is_floating(name, value)
        checks.has_rank(name, value, 4, legend)
        checks.on_device(name, value, q, "q")
    (batch, _, heads, width), (keys, kv_heads) = q.shape, k.shape[1:3]
    checks.has_dtype("k", k, q.dtype, "like q")
    checks.has_shape("k", k, (batch, keys, kv_heads, width), "[B, S, K, D] with q's B and D,")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"q must be of a multiple of k's {kv_heads} heads, got {heads}")
    _check_selection(selection, q)
    topk = selection.indices.shape[2]
    if not torch.compiler.is_compiling() and selection.indices.device.type == "cpu" and topk > 0:
        # Read on the host alone: on a device PyTorch's own gather stops at a key that does not exist.
        selected = selection.indices.masked_fill(~selection.valid, -1)
        if selected.numel() and int(selected.max()) >= keys:
            raise ValueError(f"selection.indices must be below k's {keys} keys, got {int(selected.max())}")
    if scale is not None:
        checks.is_real("scale", scale)
    checks.is_real("softcap", softcap)
    if softcap < 0:
        raise ValueError(f"softcap must be at least 0 (0 is off), got {softcap}")


def _check_selection(selection: TokenSelection, q: Tensor) -> None:
    contract.check_indices("selection.indices", selection.indices, q)
    checks.has_rank("selection.indices", selection.indices, 3, "[B, T, topk]")
    shape = (q.shape[0], q.shape[1], selection.indices.shape[2])
    checks.is_tensor("selection.valid", selection.valid)
    checks.has_dtype("selection.valid", selection.valid, torch.bool, "")
    checks.is_floating("selection.scores", selection.scores)
    for name, value in zip(TokenSelection._fields, selection, strict=True):
        checks.has_shape(f"selection.{name}", value, shape, "[B, T, topk] with q's B and T,")
        checks.on_device(f"selection.{name}", value, q, "q")

"""Named calls of ``block_sparse_attention``."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite
from kernel_index.kernels.attention.dense_attention.cases import SCALES, UNITS, qkv
from kernel_index.kernels.sparse.block_sparse_attention.api import BACKENDS, block_sparse_attention
from kernel_index.masks.attention_validity_prefix.api import attention_validity
from kernel_index.masks.doc_window_mask.cases import dense_oracle, packed
from kernel_index.masks.doc_window_mask.mask import MaskContract


def selection(m: Maker, shape: tuple[int, int, int, int], blocks: int, block_size: int) -> dict[str, Any]:
    """Random blocks, −1 among them, and duplicates where n is large."""
    return {"selected": m.integers(-1, max(1, blocks), *shape), "block_size": block_size}


def _plain(m: Maker) -> dict[str, Any]:
    return {**qkv(m, 2, 21, 21, 4, 2, 8), **selection(m, (2, 21, 2, 3), 6, 4)}


def _documents(m: Maker) -> dict[str, Any]:
    call = {**qkv(m, 2, 21, 21, 4, 2, 8), **selection(m, (2, 21, 4, 2), 6, 4)}
    return {**call, "mask": MaskContract(doc_ids=packed(21)), "selected_valid": m.integers(0, 4, 2, 21, 4, 2) > 0}


def _empty(m: Maker) -> dict[str, Any]:
    validity = attention_validity(valid_token_counts=[0, 13])
    call = {**qkv(m, 2, 17, 17, 2, 2, 4), **selection(m, (2, 17, 2, 2), 3, 8)}
    return {**call, "mask": MaskContract(validity=validity), "softcap": 2.0, "scale": 0.7}


def _sink(m: Maker) -> dict[str, Any]:
    return {**_empty(m), "softcap": 0.0, "sink": m.normal(2, dtype=torch.float32)}


def _cross(m: Maker) -> dict[str, Any]:
    call = {**qkv(m, 2, 5, 19, 4, 1, 8, 5), **selection(m, (2, 5, 2, 4), 4, 5)}
    return {**call, "mask": MaskContract(causal=False), "query_tile_size": 2}


def _window(m: Maker) -> dict[str, Any]:
    call = {**qkv(m, 1, 40, 40, 2, 1, 8), "block_size": 8, "query_tile_size": 16}
    blocks = torch.arange(5, device=m.device).expand(1, 40, 1, 5)  # every block: what is left is the window
    return {**call, "selected": blocks, "mask": MaskContract(window=(11, 0))}


CASES = (
    Case("shared", "the query heads of a KV head share a selection; a short last block; duplicates", _plain),
    Case("per_head_documents", "a selection for each query head, documents, invalid entries", _documents),
    Case("empty_rows", "a row without a token, future blocks only, a softcap and a scale", _empty),
    Case("cross", "not causal, T ≠ S, values of another size, a group for two heads", _cross),
    Case("everything", "every block selected under a window: dense attention", _window),
    Case("sink", "a float32 sink for each head, a row without a token", _sink),
    Case(
        "sink_cross",
        "a sink beside a softcap, not causal",
        lambda m: {**_cross(m), "softcap": 2.0, "sink": m.normal(4)},
    ),
    Case("no_picks", "n = 0", lambda m: {**qkv(m, 1, 5, 5, 2, 1, 8), **selection(m, (1, 5, 1, 0), 2, 4)}),
    Case("no_queries", "T = 0", lambda m: {**qkv(m, 1, 0, 5, 2, 1, 8), **selection(m, (1, 0, 1, 2), 2, 4)}),
)


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    block_size: int,
    selected_valid: Tensor | None = None,
    mask: MaskContract | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    query_tile_size: int = 64,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One query head at a time, K and V indexed by head, the selection compared with each key's block."""
    heads, keys, width = q.shape[2], k.shape[1], q.shape[3]
    inside = dense_oracle(mask or MaskContract(), q.shape[0], q.shape[1], keys)
    block = torch.arange(keys, device=q.device) // block_size
    blocks_of = selected if selected_valid is None else torch.where(selected_valid, selected, -1)
    outs, lses = [], []
    for h in range(heads):
        member = blocks_of[:, :, h * selected.shape[2] // heads, :, None] == block
        allowed = member.any(2) & inside
        k_BSD, v_BSD = (x[:, :, h * k.shape[2] // heads] for x in (k, v))
        z = torch.einsum("btd,bsd->bts", q[:, :, h], k_BSD) * (width**-0.5 if scale is None else scale)
        z = softcap * (z / softcap).tanh() if softcap else z
        z = z.masked_fill(~allowed, -torch.inf)
        last = -torch.inf if sink is None else sink[h].to(z.dtype)
        z = torch.cat([z, z.new_zeros(*z.shape[:2], 1) + last], -1)
        some = allowed.any(-1)
        opened = z.masked_fill(~some[..., None], 0.0)
        p = opened.softmax(-1).masked_fill(~some[..., None], 0.0)
        outs.append(p[..., :keys] @ v_BSD)
        lses.append(opened.logsumexp(-1).masked_fill(~some, -torch.inf))
    return torch.stack(outs, 2), torch.stack(lses, 1).to(torch.promote_types(q.dtype, torch.float32))


def sized(m: Maker, n: int) -> dict[str, Any]:
    selected = m.integers(0, -(-n // 4), 2, n, 2, 2)
    call = {**qkv(m, 2, n, n, 4, 2, 8), "selected": selected, "block_size": 4}
    # Small tiles: torch.compile specialises a size of 1, and so a single tile.
    return {**call, "mask": MaskContract(window=(5, 0), doc_ids=packed(n)), "query_tile_size": 4}


def real(m: Maker) -> dict[str, Any]:
    """16 of 128 blocks for each KV head; its bytes depend on the selection, so no compulsory ones are stated."""
    return {**qkv(m, 1, 8192, 8192, 32, 4, 128), "selected": m.integers(0, 128, 1, 8192, 4, 16), "block_size": 64}


SUITES = (
    Suite(
        op="block_sparse_attention", function=block_sparse_attention, backends=BACKENDS, cases=CASES,
        differentiable=("q", "k", "v", "sink"), oracle=oracle, sized=sized,
        scales=SCALES, rounding=("triton", "native", "cpu"), units=UNITS, real=real,
    ),
)  # fmt: skip

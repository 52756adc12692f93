"""Named calls of ``clustered_sparse_attention``."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite
from kernel_index.kernels.attention.dense_attention.cases import UNITS, qkv
from kernel_index.kernels.sparse.clustered_sparse_three_phase.api import BACKENDS, clustered_sparse_attention
from kernel_index.kernels.sparse.clustered_sparse_three_phase.config import ClusteredSparseConfig
from kernel_index.masks.attention_validity_prefix.api import attention_validity
from kernel_index.masks.doc_window_mask.cases import dense_oracle, on_each_path, packed, tree_fields
from kernel_index.masks.doc_window_mask.mask import MaskContract

CONFIG = ClusteredSparseConfig(block_size=4, topk=2, query_tile_size=8)


def _call(m: Maker, t: int, mask: MaskContract, config: ClusteredSparseConfig = CONFIG) -> dict[str, Any]:
    return {**qkv(m, 2, t, t, 4, 2, 8), "mask": mask, "config": config}


CASES = (
    Case("causal", "a ragged last block", lambda m: _call(m, 18, MaskContract())),
    Case(
        "documents",
        "documents and a window cut blocks, two steps of scoring",
        lambda m: _call(
            m, 21, MaskContract(doc_ids=packed(21), window=(9, 0)), ClusteredSparseConfig(4, 3, 8, hierarchy=(2, 9))
        ),
    ),
    Case(
        "empty_rows",
        "a row without a token",
        lambda m: _call(m, 12, MaskContract(validity=attention_validity(valid_token_counts=[0, 7]))),
    ),
    Case(
        "tree",
        "shared prompts: blocks count along each path; a window, documents, gaps",
        lambda m: _call(m, 14, MaskContract(window=(9, 0), doc_ids=packed(14), **tree_fields(14)).to(m.device)),
    ),
    Case(
        "sink",
        "a sink for each head, a row without a token",
        lambda m: {
            **_call(m, 12, MaskContract(validity=attention_validity(valid_token_counts=[0, 7]))),
            "sink": m.normal(4, dtype=torch.float32),
        },
    ),
    Case("no_queries", "T = 0", lambda m: _call(m, 0, MaskContract())),
)


def _meant(allowed: Tensor, j: int, size: int) -> list[int]:
    """Where documents meet in a block, the later one's keys: those that the block's last one may see."""
    return [s for s in range(j * size, (j + 1) * size) if allowed[j * size + size - 1, s]]


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: ClusteredSparseConfig,
    mask: MaskContract | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Query by query: the mean keys that it may be routed to, in plain Python, and one softmax over what is left."""
    if mask is not None and mask.is_tree:
        return on_each_path(oracle, q, k, v, mask, config=config, sink=sink)
    (batch, queries, heads, width), keys, kv_heads = q.shape, k.shape[1], k.shape[2]
    mask, group, size = mask or MaskContract(), heads // k.shape[2], config.block_size
    allowed = dense_oracle(mask, batch, queries, keys)
    out = torch.zeros(batch, queries, heads, v.shape[3], dtype=q.dtype) + (q.sum() + k.sum() + v.sum()) * 0
    for b in range(batch):
        for t in range(queries):
            seen = allowed[b, t].nonzero().flatten().tolist()
            for g in range(kv_heads if seen else 0):
                at = slice(g * group, (g + 1) * group)
                current, past = t // size, sorted({s // size for s in seen} - {t // size})
                query = q[b, t, at].detach().float().mean(0)
                score = {j: float(query @ k[b, _meant(allowed[b], j, size), g].detach().float().mean(0)) for j in past}
                selected = {current, *sorted(past, key=lambda j: (-score[j], j))[: config.topk - 1]}
                kept = [s for s in seen if s // size in selected]
                z = q[b, t, at] @ k[b, kept, g].T * width**-0.5
                logits = z if sink is None else torch.cat([z, sink[at, None].to(z.dtype)], -1)
                out[b, t, at] = logits.softmax(-1)[:, : len(kept)] @ v[b, kept, g]
    return out


def real(m: Maker) -> dict[str, Any]:
    """A layer of production size, with its router; of another head size than the core's case."""
    return {**qkv(m, 1, 8192, 8192, 16, 4, 64), "config": ClusteredSparseConfig(block_size=64, topk=16)}


SUITES = (
    Suite(
        op="clustered_sparse_attention", function=clustered_sparse_attention, backends=BACKENDS, cases=CASES,
        differentiable=("q", "k", "v", "sink"), oracle=oracle,
        sized=lambda m, n: _call(m, n, MaskContract(window=(9, 0), doc_ids=packed(n))),
        scales=(1e-3, 1.0, 16.0), rounding=("triton", "native", "cpu"), units=UNITS, real=real,
    ),
)  # fmt: skip

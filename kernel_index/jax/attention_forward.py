"""The forward kernel: online softmax of a tile of queries over the blocks that it walks."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernel_index.jax.block_walk import PrefetchLoop, Walk, by_chunks, kv_copies
from kernel_index.jax.kernel_launch import IN_HBM, Refs, TileMasks, launch, over_batches, per_row, result
from kernel_index.jax.tile_scores import LOG2E, MASKED, TN, Setup, allowed, dot, key_column, scores

COLUMN_TILE = 512
"""Columns whose softmax is computed while the next ones are multiplied; unrolled, or the two would take turns."""


def _forward_kernel(refs: Refs, setup: Setup, width: int) -> None:
    o_ref, lse_ref, *buffers, row_max_ref, row_sum_ref, acc_ref, sems, slot_ref = refs.own
    k_buffer, v_buffer = buffers[:2]
    size = setup.block
    copies = kv_copies(refs.k, refs.v, refs.q_end, buffers, sems, size)
    loop = PrefetchLoop(refs.spans, refs.lists, width, copies, slot_ref)
    q, bounds = refs.q[0, 0, 0], refs.bounds[0, 0]  # [C, D], [2 or 3, C]
    columns = q.shape[0]
    row_max_ref[...] = jnp.full_like(row_max_ref, MASKED)  # [1, C]
    row_sum_ref[...] = jnp.zeros_like(row_sum_ref)  # [1, C]
    acc_ref[...] = jnp.zeros_like(acc_ref)  # [Dv, C]

    def attend(slot: Any, at: Any, blocks: list[Any]) -> None:
        rows = pl.ds(at, len(blocks) * size)
        k, v = k_buffer[slot, rows], v_buffer[slot, rows]  # [keys, D], [keys, Dv]
        q_end = None if refs.q_end is None else key_column(buffers[2][slot], size)  # [keys, 1]
        tiles = [slice(c, min(c + COLUMN_TILE, columns)) for c in range(0, columns, COLUMN_TILE)]
        every = [scores(k, q[c], setup) for c in tiles]  # [keys, ≤ COLUMN_TILE] each
        for c, s in zip(tiles, every, strict=True):
            s = jnp.where(allowed(bounds[:, c], refs.word_of(c), blocks, size, q_end), s, MASKED)
            old_max = row_max_ref[:, c]
            new_max = jnp.maximum(old_max, jnp.max(s, 0, keepdims=True))
            # A query without a key so far has row_max = MASKED and p = 1 here; its first real score sets alpha to 0.
            p = jnp.exp2((s - new_max) * setup.base2)  # [keys, columns]
            alpha = jnp.exp2((old_max - new_max) * setup.base2)  # [1, columns]
            row_max_ref[:, c] = new_max
            row_sum_ref[:, c] = row_sum_ref[:, c] * alpha + jnp.sum(p, 0, keepdims=True)
            acc_ref[:, c] = acc_ref[:, c] * alpha + dot(v, p.astype(v.dtype), TN)

    loop.run(by_chunks(loop, size, attend))
    row_sum = row_sum_ref[...]
    empty = (row_max_ref[...] <= MASKED / 2) & (row_sum == row_sum)  # NaN may be left out of a maximum
    row_sum = jnp.where(empty, 1.0, row_sum)
    lse_ref[0, 0, 0] = jnp.where(empty, -jnp.inf, row_max_ref[...] * (setup.base2 / LOG2E) + jnp.log(row_sum))
    out = acc_ref[...] * jnp.where(empty, 0.0, 1.0 / row_sum)  # [Dv, C]
    o_ref[0, 0, 0] = out.T.astype(o_ref.dtype)


@over_batches
def forward(setup: Setup, walk: Walk, masks: TileMasks, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
    """Output [B, K, tiles, C, Dv] and log-sum-exp [B, K, tiles, 1, C] of q [B, K, tiles, C, D].

    k [B, K, S, D] and v [B, K, S, Dv] stay in HBM; S is a multiple of the block.
    """
    batch, heads, rows, columns, width = q.shape
    value_width = v.shape[-1]
    keys = walk.width * setup.block
    return launch(
        _forward_kernel,
        "attention_forward",
        setup,
        walk,
        masks,
        (q, *masks.given, k, v),
        (
            per_row(columns, width),
            *masks.specs(of_tile=True),
            IN_HBM,
            IN_HBM,
        ),
        (
            (result((batch, heads, rows, columns, value_width), q.dtype, q), per_row(columns, value_width)),
            (result((batch, heads, rows, 1, columns), jnp.float32, q), per_row(1, columns)),
        ),
        [
            pltpu.VMEM((2, keys, width), k.dtype),
            pltpu.VMEM((2, keys, value_width), v.dtype),
            *masks.key_buffers(),
            pltpu.VMEM((1, columns), jnp.float32),
            pltpu.VMEM((1, columns), jnp.float32),
            pltpu.VMEM((value_width, columns), jnp.float32),
            pltpu.SemaphoreType.DMA((3, 2, walk.width)),
        ],
    )

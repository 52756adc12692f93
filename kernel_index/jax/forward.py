"""The forward kernel: online softmax of a tile of queries over the blocks that it walks."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernel_index.jax.tiles import (
    IN_HBM,
    LOG2E,
    NOTHING,
    TN,
    Setup,
    Tiles,
    allowed,
    bounds_spec,
    call,
    dot,
    key_copies,
    over_batches,
    per_row,
    result,
    scores,
    visit,
)
from kernel_index.jax.walk import Steps, Walk

PIECE = 512
"""Columns whose softmax is computed while the next ones are multiplied: written out, or the two would take turns."""


def _forward_kernel(refs: Any, setup: Setup, width: int) -> None:
    o_ref, lse_ref, k_buffer, v_buffer, m_ref, l_ref, acc_ref, sems, slot_ref = refs.rest
    size = setup.block
    copies = key_copies(refs.k, refs.v, k_buffer, v_buffer, sems, size)
    steps = Steps(refs.spans, refs.lists, width, copies, slot_ref)
    q, bounds = refs.q[0, 0, 0], refs.bounds[0, 0]
    columns = q.shape[0]
    m_ref[...] = jnp.full_like(m_ref, NOTHING)
    l_ref[...] = jnp.zeros_like(l_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

    def attend(slot: Any, at: Any, blocks: list[Any]) -> None:
        rows = pl.ds(at, len(blocks) * size)
        k, v = k_buffer[slot, rows], v_buffer[slot, rows]
        pieces = [slice(c, min(c + PIECE, columns)) for c in range(0, columns, PIECE)]
        every = [scores(k, q[c], setup) for c in pieces]
        for c, s in zip(pieces, every, strict=True):
            s = jnp.where(allowed(bounds[:, c], refs.word(c), blocks, size), s, NOTHING)
            before = m_ref[:, c]
            m = jnp.maximum(before, jnp.max(s, 0, keepdims=True))
            # A query that has seen nothing yet has m = NOTHING, p = 1 here; its first real score sets that to 0.
            p = jnp.exp2((s - m) * setup.base2)
            fading = jnp.exp2((before - m) * setup.base2)
            m_ref[:, c] = m
            l_ref[:, c] = l_ref[:, c] * fading + jnp.sum(p, 0, keepdims=True)
            acc_ref[:, c] = acc_ref[:, c] * fading + dot(v, p.astype(v.dtype), TN)

    steps.run(visit(steps, size, attend))
    empty = m_ref[...] <= NOTHING / 2
    total = jnp.where(empty, 1.0, l_ref[...])
    lse_ref[0, 0, 0] = jnp.where(empty, -jnp.inf, m_ref[...] * (setup.base2 / LOG2E) + jnp.log(total))
    out = acc_ref[...] * jnp.where(empty, 0.0, 1.0 / total)
    o_ref[0, 0, 0] = out.T.astype(o_ref.dtype)


@over_batches
def forward(setup: Setup, walk: Walk, tiles: Tiles, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
    """Output [B, K, tiles, C, Dv] and log-sum-exp [B, K, tiles, 1, C] of q [B, K, tiles, C, D].

    k [B, K, S, D] and v [B, K, S, Dv] stay in HBM; S is a multiple of the block.
    """
    batch, heads, rows, columns, width = q.shape
    value_width = v.shape[-1]
    members = () if tiles.members is None else (tiles.members,)
    keys = walk.width * setup.block
    return call(
        _forward_kernel,
        "attention_forward",
        setup,
        walk,
        tiles,
        (q, tiles.bounds, *members, k, v),
        (
            per_row(columns, width),
            bounds_spec(tiles.bounds),
            *(per_row(*x.shape[3:]) for x in members),
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
            pltpu.VMEM((1, columns), jnp.float32),
            pltpu.VMEM((1, columns), jnp.float32),
            pltpu.VMEM((value_width, columns), jnp.float32),
            pltpu.SemaphoreType.DMA((2, 2, walk.width)),
        ],
    )

"""The backward kernels: dQ by tiles of queries, dK and dV by blocks of keys.  Nothing is summed by atomics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernel_index.jax.tiles import (
    IN_HBM,
    LOG2E,
    NN,
    NT,
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


def _weights(k: Any, q: Any, stats: Any, allowed: Callable[[], Any], setup: Setup) -> tuple[Any, Any]:
    """Probabilities [keys, C] from the log-sum-exp, and the scores they were made from."""
    s = scores(k, q, setup)
    p = jnp.exp2(s * setup.base2 - stats[0:1] * LOG2E)
    return jnp.where(allowed(), p, 0.0), s  # the mask last: kept over the exponential, it would be spilled


def _score_gradient(p: Any, s: Any, v: Any, do: Any, stats: Any, setup: Setup) -> Any:
    """The gradient of ``scale · k·qᵀ``."""
    ds = p * (dot(v, do, NT) - stats[1:2])
    return ds * (1.0 - (s * (1.0 / setup.softcap)) ** 2) if setup.softcap else ds


def _dq_kernel(refs: Any, setup: Setup, width: int) -> None:
    do_ref, stats_ref, dq_ref, k_buffer, v_buffer, acc_ref, sems, slot_ref = refs.rest
    size = setup.block
    copies = key_copies(refs.k, refs.v, k_buffer, v_buffer, sems, size)
    steps = Steps(refs.spans, refs.lists, width, copies, slot_ref)
    q, do, stats, bounds = refs.q[0, 0, 0], do_ref[0, 0, 0], stats_ref[0, 0, 0], refs.bounds[0, 0]
    acc_ref[...] = jnp.zeros_like(acc_ref)

    def attend(slot: Any, at: Any, blocks: list[Any]) -> None:
        rows = pl.ds(at, len(blocks) * size)
        k, v = k_buffer[slot, rows], v_buffer[slot, rows]
        p, s = _weights(k, q, stats, lambda: allowed(bounds, refs.word(), blocks, size), setup)
        ds = _score_gradient(p, s, v, do, stats, setup)
        acc_ref[...] += dot(k, ds.astype(k.dtype), TN)

    steps.run(visit(steps, size, attend))
    dq_ref[0, 0, 0] = (acc_ref[...] * setup.scale).T.astype(dq_ref.dtype)


def _dkv_kernel(refs: Any, setup: Setup, width: int) -> None:
    do_hbm, stats_hbm, dk_ref, dv_ref, *buffers, dk_acc, dv_acc, sems, slot_ref = refs.rest
    b, h, block = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    own_bounds = refs.bounds.at[0 if refs.bounds.shape[0] == 1 else b]

    def copies(row: Any, tile: Any, slot: Any, place: int) -> tuple:
        sources = [x.at[b, h, tile] for x in (refs.q, do_hbm, stats_hbm)]
        sources.append(own_bounds.at[tile])
        if refs.members is not None:
            sources.append(refs.members.at[b, h, tile, row >> 5])
        pairs = enumerate(zip(sources, buffers, strict=True))
        return tuple(pltpu.make_async_copy(x, y.at[slot], sems.at[i, slot]) for i, (x, y) in pairs)

    steps = Steps(refs.spans, refs.lists, width, copies, slot_ref)
    k, v = refs.k[0, 0], refs.v[0, 0]
    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)

    def attend(step: Any, slot: Any) -> None:
        q, do, stats, bounds = (x[slot] for x in buffers[:4])
        word = None if refs.members is None else lambda _: buffers[4][slot]
        p, s = _weights(k, q, stats, lambda: allowed(bounds, word, [block], setup.block), setup)
        dv_acc[...] += dot(p.astype(do.dtype), do, NN)
        ds = _score_gradient(p, s, v, do, stats, setup)
        dk_acc[...] += dot(ds.astype(q.dtype), q, NN)

    steps.run(attend)
    dk_ref[0, 0] = (dk_acc[...] * setup.scale).astype(dk_ref.dtype)
    dv_ref[0, 0] = dv_acc[...].astype(dv_ref.dtype)


@over_batches
def gradient_q(
    setup: Setup,
    walk: Walk,
    tiles: Tiles,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    stats: jax.Array,
) -> jax.Array:
    """dQ in q's shape; ``stats`` float32 [B, K, tiles, 2, C] holds the log-sum-exp (large where empty) and δ."""
    columns, width = q.shape[3:]
    value_width = v.shape[-1]
    members = () if tiles.members is None else (tiles.members,)
    keys = walk.width * setup.block
    (dq,) = call(
        _dq_kernel,
        "attention_dq",
        setup,
        walk,
        tiles,
        (q, tiles.bounds, *members, k, v, do, stats),
        (
            per_row(columns, width),
            bounds_spec(tiles.bounds),
            *(per_row(*x.shape[3:]) for x in members),
            IN_HBM,
            IN_HBM,
            per_row(columns, value_width),
            per_row(2, columns),
        ),
        ((result(q.shape, q.dtype, q), per_row(columns, width)),),
        [
            pltpu.VMEM((2, keys, width), k.dtype),
            pltpu.VMEM((2, keys, value_width), v.dtype),
            pltpu.VMEM((width, columns), jnp.float32),
            pltpu.SemaphoreType.DMA((2, 2, walk.width)),
        ],
    )
    return dq


@over_batches
def gradient_kv(
    setup: Setup,
    walk: Walk,
    tiles: Tiles,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    stats: jax.Array,
) -> tuple:
    """dK and dV in the shapes of k and v; the walk's rows are blocks of keys and its entries tiles, one at a time."""
    members = () if tiles.members is None else (tiles.members,)

    def keys(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, setup.block, x.shape[-1]), lambda b, h, r: (b, h, r, 0))

    buffers = [pltpu.VMEM((2, *x.shape[3:]), x.dtype) for x in (q, do, stats)]
    buffers.append(pltpu.VMEM((2, *tiles.bounds.shape[2:]), jnp.int32))
    buffers.extend(pltpu.VMEM((2, *x.shape[4:]), jnp.int32) for x in members)
    return call(
        _dkv_kernel,
        "attention_dkv",
        setup,
        walk,
        tiles,
        (q, tiles.bounds, *members, k, v, do, stats),
        (IN_HBM, IN_HBM, *(IN_HBM for _ in members), keys(k), keys(v), IN_HBM, IN_HBM),
        ((result(k.shape, k.dtype, k), keys(k)), (result(v.shape, v.dtype, v), keys(v))),
        [
            *buffers,
            pltpu.VMEM((setup.block, k.shape[-1]), jnp.float32),
            pltpu.VMEM((setup.block, v.shape[-1]), jnp.float32),
            pltpu.SemaphoreType.DMA((len(buffers), 2)),
        ],
    )

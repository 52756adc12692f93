"""The backward kernels: dQ by tiles of queries, dK and dV by blocks of keys.  No sum is made by atomics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernel_index.jax.block_walk import PrefetchLoop, Walk, by_chunks, kv_copies
from kernel_index.jax.kernel_launch import IN_HBM, Refs, TileMasks, launch, over_batches, per_row, result
from kernel_index.jax.tile_scores import LOG2E, NN, NT, TN, Setup, allowed, dot, key_column, scores


def _probabilities(k: Any, q: Any, stats: Any, allowed: Callable[[], Any], setup: Setup) -> tuple[Any, Any]:
    """Probabilities [keys, C] from the log-sum-exp, and their scores [keys, C]."""
    s = scores(k, q, setup)
    p = jnp.exp2(s * setup.base2 - stats[0:1] * LOG2E)  # [keys, C]; stats [2, C]
    return jnp.where(allowed(), p, 0.0), s  # the mask last: held during the exponential, it would be spilled


def _score_gradient(p: Any, s: Any, v: Any, do: Any, stats: Any, setup: Setup) -> Any:
    """The gradient of ``scale · k·qᵀ``, [keys, C]; v [keys, Dv], do [C, Dv]."""
    ds = p * (dot(v, do, NT) - stats[1:2])
    return ds * (1.0 - (s * (1.0 / setup.softcap)) ** 2) if setup.softcap else ds


def _dq_kernel(refs: Refs, setup: Setup, width: int) -> None:
    do_ref, stats_ref, dq_ref, *buffers, acc_ref, sems, slot_ref = refs.own
    k_buffer, v_buffer = buffers[:2]
    size = setup.block
    copies = kv_copies(refs.k, refs.v, refs.q_end, buffers, sems, size)
    loop = PrefetchLoop(refs.spans, refs.lists, width, copies, slot_ref)
    q, do = refs.q[0, 0, 0], do_ref[0, 0, 0]  # [C, D], [C, Dv]
    stats, bounds = stats_ref[0, 0, 0], refs.bounds[0, 0]  # [2, C], [2 or 3, C]
    acc_ref[...] = jnp.zeros_like(acc_ref)  # [D, C]

    def attend(slot: Any, at: Any, blocks: list[Any]) -> None:
        rows = pl.ds(at, len(blocks) * size)
        k, v = k_buffer[slot, rows], v_buffer[slot, rows]  # [keys, D], [keys, Dv]
        q_end = None if refs.q_end is None else key_column(buffers[2][slot], size)  # [keys, 1]
        p, s = _probabilities(k, q, stats, lambda: allowed(bounds, refs.word_of(), blocks, size, q_end), setup)
        ds = _score_gradient(p, s, v, do, stats, setup)  # [keys, C]
        acc_ref[...] += dot(k, ds.astype(k.dtype), TN)

    loop.run(by_chunks(loop, size, attend))
    dq_ref[0, 0, 0] = (acc_ref[...] * setup.scale).T.astype(dq_ref.dtype)


def _dkv_kernel(refs: Refs, setup: Setup, width: int) -> None:
    do_hbm, stats_hbm, dk_ref, dv_ref, *buffers, dk_acc, dv_acc, sems, slot_ref = refs.own
    b, h, block = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    row_bounds = refs.bounds.at[0 if refs.bounds.shape[0] == 1 else b]

    def copies(row: Any, tile: Any, slot: Any, _: int) -> tuple:
        sources = [x.at[b, h, tile] for x in (refs.q, do_hbm, stats_hbm)]
        sources.append(row_bounds.at[tile])
        if refs.members is not None:
            sources.append(refs.members.at[b, h, tile, row >> 5])
        pairs = enumerate(zip(sources, buffers, strict=True))
        return tuple(pltpu.make_async_copy(x, y.at[slot], sems.at[i, slot]) for i, (x, y) in pairs)

    loop = PrefetchLoop(refs.spans, refs.lists, width, copies, slot_ref)
    k, v = refs.k[0, 0], refs.v[0, 0]  # [block, D], [block, Dv]
    q_end = None if refs.q_end is None else key_column(refs.q_end[0, 0], setup.block)  # [block, 1]
    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)

    def attend(_: Any, slot: Any) -> None:
        q, do, stats, bounds = (x[slot] for x in buffers[:4])  # [C, D], [C, Dv], [2, C], [2 or 3, C]
        word_of = None if refs.members is None else lambda _: buffers[4][slot]
        p, s = _probabilities(k, q, stats, lambda: allowed(bounds, word_of, [block], setup.block, q_end), setup)
        dv_acc[...] += dot(p.astype(do.dtype), do, NN)
        ds = _score_gradient(p, s, v, do, stats, setup)
        dk_acc[...] += dot(ds.astype(q.dtype), q, NN)

    loop.run(attend)
    dk_ref[0, 0] = (dk_acc[...] * setup.scale).astype(dk_ref.dtype)
    dv_ref[0, 0] = dv_acc[...].astype(dv_ref.dtype)


@over_batches
def gradient_q(
    setup: Setup,
    walk: Walk,
    masks: TileMasks,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    stats: jax.Array,
) -> jax.Array:
    """dQ in q's shape; ``stats`` float32 [B, K, tiles, 2, C] holds the log-sum-exp (large where empty) and δ."""
    columns, width = q.shape[3:]
    value_width = v.shape[-1]
    keys = walk.width * setup.block
    (dq,) = launch(
        _dq_kernel,
        "attention_dq",
        setup,
        walk,
        masks,
        (q, *masks.given, k, v, do, stats),
        (
            per_row(columns, width),
            *masks.specs(of_tile=True),
            IN_HBM,
            IN_HBM,
            per_row(columns, value_width),
            per_row(2, columns),
        ),
        ((result(q.shape, q.dtype, q), per_row(columns, width)),),
        [
            pltpu.VMEM((2, keys, width), k.dtype),
            pltpu.VMEM((2, keys, value_width), v.dtype),
            *masks.key_buffers(),
            pltpu.VMEM((width, columns), jnp.float32),
            pltpu.SemaphoreType.DMA((3, 2, walk.width)),
        ],
    )
    return dq


@over_batches
def gradient_kv(
    setup: Setup,
    walk: Walk,
    masks: TileMasks,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    stats: jax.Array,
) -> tuple[jax.Array, ...]:
    """dK and dV in the shapes of k and v; the walk's rows are blocks of keys, its entries tiles; its width is 1."""
    members = () if masks.members is None else (masks.members,)

    def keys(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, setup.block, x.shape[-1]), lambda b, h, r: (b, h, r, 0))

    buffers = [pltpu.VMEM((2, *x.shape[3:]), x.dtype) for x in (q, do, stats)]
    buffers.append(pltpu.VMEM((2, *masks.bounds.shape[2:]), jnp.int32))
    buffers.extend(pltpu.VMEM((2, *x.shape[4:]), jnp.int32) for x in members)
    return launch(
        _dkv_kernel,
        "attention_dkv",
        setup,
        walk,
        masks,
        (q, *masks.given, k, v, do, stats),
        (IN_HBM, *masks.specs(of_tile=False), keys(k), keys(v), IN_HBM, IN_HBM),
        ((result(k.shape, k.dtype, k), keys(k)), (result(v.shape, v.dtype, v), keys(v))),
        [
            *buffers,
            pltpu.VMEM((setup.block, k.shape[-1]), jnp.float32),
            pltpu.VMEM((setup.block, v.shape[-1]), jnp.float32),
            pltpu.SemaphoreType.DMA((len(buffers), 2)),
        ],
    )

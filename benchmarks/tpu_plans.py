"""What does planning a long row cost, and how many compilations do many batches take?  JAX, on the CPU.

Splash attention plans on the host, in Python, over all pairs of blocks; a walk is planned inside jit from the first and
the last query of each tile.  Target: 1000 times faster for causal and local attention over 32768 tokens.
"""

import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as splash_info

import kernel_index.jax as kij
from benchmarks.harness import Comparison, Row, console
from kernel_index.jax.attention_compiled import KERNELS
from kernel_index.jax.attention_pallas import interval_walk

OPS = ()  # plans, which have no backends
TOKENS, BLOCK, WINDOW = 32768, 512, 1024


def timed(call, rounds: int) -> list[float]:
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - begin)
    return found


def splash_plan() -> object:
    square = (TOKENS, TOKENS)
    causal = splash_mask.CausalMask(square)
    mask = splash_mask.LogicalAnd(causal, splash_mask.LocalMask(square, (WINDOW, WINDOW), 0))
    splash_info._process_mask.cache_clear()
    info, _ = splash_info.process_mask(splash_mask.MultiHeadMask([mask]), (BLOCK, BLOCK))
    return np.asarray(info.block_mask)


def planning(rounds: int) -> Comparison:
    plan = jax.jit(lambda mask: interval_walk(mask, TOKENS, TOKENS, BLOCK, BLOCK).spans)
    local = kij.MaskContract(window=(WINDOW, 0))
    ids = jnp.repeat(jnp.arange(16), TOKENS // 16)[None]
    packed = kij.MaskContract(window=(WINDOW, 0), doc_ids=ids)
    first = [timed(lambda m=mask: plan(m), 1)[0] for mask in (local, packed)]
    rows = [
        Row("kernel_index", timed(lambda: plan(local), rounds * 20), first[0]),
        Row("kernel_index with 16 documents", timed(lambda: plan(packed), rounds * 20), first[1]),
        Row("Splash process_mask", timed(splash_plan, 1), None),
    ]
    for row in rows:
        console.print(f"{row.contender:>40}: {row.median * 1e3:10.3f} ms")
    ratio = rows[2].median / rows[0].median
    console.print(f"target: 1000 times faster: {'met' if ratio >= 1000 else 'missed'} ({ratio:,.0f} times)")
    targets = {"Splash process_mask": 1 / 1000}
    return Comparison(f"planning causal + local {WINDOW} at {TOKENS} tokens", rows, "kernel_index", targets)


def batches(count: int = 20) -> None:
    """Many batches of documents through one compiled function; the counters are those of ``MaskKernelCache``."""
    KERNELS.cache.clear()
    q = jnp.ones((2, 256, 2, 16))
    for seed in range(count):
        ids = jnp.sort(jnp.asarray(np.random.default_rng(seed).integers(0, 9, (2, 256))), -1)
        kij.attention(q, q, q, kij.MaskContract(doc_ids=ids))
    console.print(f"{count} batches: {KERNELS.compilations()} compilation, {KERNELS!r}")


def main(rounds: int = 5) -> list[Comparison]:
    found = planning(rounds)
    batches()
    return [found]

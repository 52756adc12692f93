"""What ``prove tpu`` reads from dumps and plans; and, where libtpu is installed, one kernel compiled for a v5e."""

import importlib.util
import itertools

import numpy as np
import pytest

from kernel_index.proofs import tpu
from kernel_index.proofs.tpu_dumps import KernelFigures, Loop, believable, loops_of

DUMP = """= control target key start
LB: loop body
 0x1   :  { %a = smov 0 }
 0x2 LB: > { %b = sadd }
 0x3   : > { %c = sbr.rel (%p1) target = $region9 }
 0x4   : > { %d = vst }
 0x5   :  {}
 0x6 PF: > { %e = vld }
 0x7 LB: >> { %f = vmul }
 0x8   : >> { %g = sbr.rel (%p2) target = $region7 }
 0x9   : > { %h = vadd }
 0xa   :  { %i = halt }
"""


def test_bundles_are_counted_by_loop():
    assert loops_of(DUMP) == (Loop(1, 6, (2,)), Loop(2, 2))


def test_an_estimate_below_the_peak_is_refused():
    assert believable(1000, 131_072 * 1001.0, "v5e") == "below flops ÷ peak (1,001 cycles)"
    assert believable(1001, 131_072 * 1001.0, "v5e") is None
    assert believable(10**12, 1.0, "7x") == "no peak is known for this generation"


def test_without_libtpu_the_command_is_missing(monkeypatch):
    monkeypatch.setattr(tpu.importlib.util, "find_spec", lambda name: None if name == "libtpu" else name)
    assert tpu.why_not() == "needs the libtpu package: pip install 'kernel-index[tpu]'"


def figures(*loops: Loop) -> KernelFigures:
    return KernelFigures("kernel", 0, loops, 0, 0, 0, {})


def test_work_is_counted_from_plans():
    pytest.importorskip("jax")
    from kernel_index.jax.block_walk import Walk
    from kernel_index.proofs import tpu_plans

    assert tpu_plans.causal_pairs(2048, 512) == 10
    theirs = tpu_plans.splash_work(figures(Loop(1, 100, (5, 60, 7))), 2048)
    assert (theirs.tiles, theirs.bundles) == (80, 80 * 88 + 32 * 12)
    spans = np.zeros((1, 2, 5, 3), np.int32)
    spans[0, :, 0] = 9, 4, 0  # blocks of three rows, for each of two KV heads
    walk = Walk(spans, np.zeros((1, 2, 3, 1, 16), np.int32))
    ours = tpu_plans.union_work(figures(Loop(1, 10), Loop(2, 50, (40, 3)), Loop(3, 8)), walk, 768, words=1)
    assert ours.tiles == 26 * 4 / 8
    assert ours.bundles == 2 * (3 * 50 + 1 * 8 + 1 * 10) + 6 * 10
    assert tpu_plans.union_bytes(walk) == 26 * 128 * 2 * 128 * 2


def test_drawn_blocks_are_legal_and_neighbours_overlap():
    pytest.importorskip("jax")
    from kernel_index.proofs.tpu_plans import drifting_selection

    selected = drifting_selection(4096)
    for head, t in itertools.product(range(2), (0, 127, 128, 3000, 4095)):
        own = selected[0, t, head]
        own = own[own >= 0]
        assert len(set(own.tolist())) == len(own) == min(16, t // 128 + 1)
        assert own.max() == t // 128
    shared = (selected[0, 2500:3999, 0, :, None] == selected[0, 2501:4000, 0, None, :]).any(-1).sum(-1)
    assert 15.9 < shared.mean() < 16


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the libtpu package (the tpu extra)")
def test_a_kernel_compiles_for_a_tpu_that_is_not_here():
    compiled = tpu.compile_case("attention", "v5e", 2048, forward=True)
    assert compiled.error == ""
    kernel = compiled.kernel("attention_forward")
    assert len(kernel.at_depth(1)) == len(kernel.at_depth(2)) == 1
    assert 0 < kernel.vmem < 16 << 20
    assert 0 < kernel.smem < 1 << 20

"""A loop that fills a tile which a product may still read is found, and is compiled without stages instead."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kernel_index.core.target import has_package
from kernel_index.core.triton.overwritten_tiles import overwritten

ROOT = Path(__file__).parents[2]

LOOP = """
    %c0 = arith.constant 0 : i32
    %c1 = arith.constant 1 : i32
    %c2 = arith.constant 2 : i32
    %tiles = arith.constant {tiles} : i32
    %w = ttg.local_alloc : () -> !ttg.memdesc<{tiles}x16x64xbf16, #shared, #smem, mutable>
    %r:3 = scf.for %k = %c0 to %width step %c1 iter_args(%acc = %zero, %next = %c1, %now = %c0) -> (tensor)  : i32 {{
      %here = ttg.memdesc_index %w[%now] : !ttg.memdesc<{tiles}x16x64xbf16> -> !ttg.memdesc<16x64xbf16>
      %turned = ttg.memdesc_trans %here {{order = array<i32: 1, 0>}} : !ttg.memdesc -> !ttg.memdesc
      %y = ttng.warp_group_dot %x, %turned, %acc {{isAsync = true}} : tensor * !ttg.memdesc -> tensor
      {wait}
      %up = arith.addi %next, %c1 : i32
      %is = arith.cmpi sge, %up, %tiles : i32
      %then = arith.select %is, %c0, %up : i32
      %there = ttg.memdesc_index %w[%then] : !ttg.memdesc<{tiles}x16x64xbf16> -> !ttg.memdesc<16x64xbf16>
      %copy = ttg.async_copy_global_to_local %p, %there mask %m : tensor -> <16x64xbf16>
      %on = arith.addi %now, %c1 : i32
      %last = arith.cmpi sge, %on, %tiles : i32
      %following = arith.select %last, %c0, %on : i32
      scf.yield %y, %then, %following : tensor, i32, i32
    }}
"""
WAIT = "%z:2 = ttng.warp_group_dot_wait %y, %turned {pendings = 0 : i32} : tensor, !ttg.memdesc"


LATER = WAIT.replace("pendings = 0", "pendings = 1")


@pytest.mark.parametrize(
    ("tiles", "wait", "faults"), [(2, "", 1), (2, WAIT, 0), (2, LATER, 1), (3, LATER, 0), (3, "", 1)]
)
def test_a_tile_of_a_product_under_way(tiles, wait, faults):
    found = overwritten(LOOP.format(tiles=tiles, wait=wait))
    assert len(found) == faults
    assert all("%there" in line for line in found)


@pytest.mark.parametrize(("wait", "faults"), [("", 1), (WAIT, 0)])
def test_a_loop_inside_of_another_is_followed_by_itself(wait, faults):
    head = "    %o = scf.for %i = %c0 to %n step %c1 iter_args(%a = %c0) -> (i32)  : i32 {"
    inside = textwrap.indent(LOOP.format(tiles=2, wait=wait), "  ")
    assert len(overwritten(f"{head}{inside}      scf.yield %a : i32\n    }}\n")) == faults


def test_a_loop_without_results():
    code = LOOP.format(tiles=2, wait=WAIT)
    inside = [line for line in code.splitlines() if "scf.yield" not in line]
    head = next(i for i, line in enumerate(inside) if "scf.for" in line)
    inside[head] = "    scf.for %k = %c0 to %width step %c1  : i32 {"
    assert overwritten("\n".join(inside)) == [], "the product is waited for"
    code = "\n".join(line for line in inside if "dot_wait" not in line)
    assert overwritten(code) == [], "numbers that nobody knows may be different"
    same = re.sub("%(now|then)\\]", "%c0]", code)
    assert len(overwritten(same)) == 1


@pytest.mark.parametrize("text", ["scf.for %i", "scf.for %k = %a to %b step %c iter_args(%x = %y) -> (i32)  : i32 {"])
def test_a_text_of_another_form_stops_no_kernel(text):
    assert overwritten(f"{text}\n  %y = ttng.warp_group_dot %a\n") == []


COMPILED = """
import dataclasses, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from kernel_index.core.triton.jit import Kernel
from kernel_index.core.triton.overwritten_tiles import overwritten
from kernel_index.proofs import aot
from tests.proofs import kernels

target, kernel = GPUTarget("cuda", 90, 32), Kernel(kernels.overwriting_kernel.fn)
kinds = {"x_ptr": "*bf16", "w_ptr": "*bf16", "y_ptr": "*fp32", "width": "i32", "BLOCK": "constexpr"}
constants, aligned = {(4,): 64}, {(i,): [["tt.divisibility", 16]] for i in range(4)}
built = []

def build(key, signature, device, constants, options, *rest):
    built.append(options.num_stages)
    source = ASTSource(kernel, kinds, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options=options.__dict__)

options = CUDABackend(target).parse_options({"num_warps": 4})
first = build(None, None, None, constants, options)
print("found", len(overwritten(first.asm["ttgir"])))
built.clear()
right = kernel._right(build, None, None, None, constants, options)
print("left", len(overwritten(right.asm["ttgir"])), "stages", built)
launch = aot.Launch(kernel, tuple(kinds.items()), (("BLOCK", 64),), (0, 1, 2, 3), (("num_warps", 4),))
print("proof", aot.compile_for("toy", launch, "sm90").error)
"""


@pytest.mark.skipif(not has_package("triton"), reason="needs Triton")
def test_such_a_kernel_is_compiled_without_stages_and_the_proof_names_it():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    found, left, proof = done.stdout.splitlines()
    assert found == "found 1", "Triton gives such a load more tiles now: is the check needed?"
    assert left == "left 0 stages [3, 1]"
    assert proof.startswith("proof a product reads an overwritten tile: ")

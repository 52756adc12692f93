"""Ahead-of-time compilation: real machine code for GPUs that are not here; a kernel that spills is found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SPILLS = """
import torch
from kernel_index.proofs import aot
from tests.proofs import kernels
args = (torch.empty(32768, device="meta"), torch.empty(32768, device="meta"))
launch = aot._launch(kernels.spilling_kernel, args, {"BLOCK": 32768, "num_warps": 4})
print(aot.compile_for("toy", launch, "sm90").spilled)
"""


def not_interpreted(*command: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False, timeout=240
    )


@pytest.mark.thorough
def test_compiles_for_nvidia_and_amd_without_either(tmp_path):
    out = tmp_path / "aot.json"
    targets = ("--target", "sm80", "--target", "sm90", "--target", "gfx942")
    command = ("-m", "kernel_index.cli", "prove", "aot", *targets, "--op", "fused_relu_squared", "--json", str(out))
    done = not_interpreted(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(out.read_text())
    assert content["passed"]
    assert len(content["rows"]) == 6, "two kernels for three targets"
    for row in content["rows"]:
        assert row["error"] == ""
        assert row["spilled"] == 0
        assert row["registers"] > 0
        assert row["bytes"] > 1000, "machine code"


def test_a_spilling_kernel_is_found():
    done = not_interpreted("-c", SPILLS)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


AHEAD = """
import triton
from kernel_index.proofs import aot
from kernel_index.core.testing import suites
suite = next(s for s in suites() if s.op == "fa4_kvcache_decode")
(walk,) = [x for x in aot.launches(suite, aot.TARGETS["sm90"]) if x.kernel.__name__ == "_split_kernel"]
source = aot.source_of(walk)
built = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32), options=dict(walk.options))
print(built.asm["ttgir"].count("async_copy_global_to_local"))
"""


@pytest.mark.thorough
def test_decoding_has_keys_under_way_before_they_are_needed():
    """Triton's pipeliner gives up without a word where it does not like a kernel: the walk is then half as fast."""
    done = not_interpreted("-c", AHEAD)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 4, "keys and values, before the walk and in it"


@pytest.mark.thorough
def test_unknown_target_and_op_are_named():
    assert "--target must be one of sm80" in not_interpreted(
        "-m", "kernel_index.cli", "prove", "aot", "--target", "sm7"
    ).stderr.replace("\n", " ").replace("│", "").replace("  ", " ")
    assert not_interpreted("-m", "kernel_index.cli", "prove", "aot", "--op", "nothing").returncode == 2


LISTS = """
import torch
from kernel_index.masks.prefix_tree import triton_tiles
from kernel_index.proofs import aot
empty = torch.empty(64, dtype=torch.int32, device="meta")
sizes = (64, 64, 256, 256, 2, 4, 4)
ranges = (empty,) * 5 + sizes, {"BM": 128, "BN": 64, "BLOCK_M": 128, "BLOCK_N": 64, "IN_TREE": True}
lists = (empty,) * 4 + (2, 4, 2), {"BY_KEY": True, "IN_TREE": True, "CHUNK": 128}
for kernel, (args, constants) in zip((triton_tiles._ranges_kernel, triton_tiles._lists_kernel), (ranges, lists)):
    found = aot.compile_for("lists", aot._launch(kernel, args, {**constants, "num_warps": 1}), "sm90")
    print(found.error, found.spilled, found.bytes > 1000)
"""


def test_lists_of_tiles_compile_for_tiles_that_are_not_square():
    """An interpreter lets one name hold blocks of two shapes; a compiler does not."""
    done = not_interpreted("-c", LISTS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [" 0 True"] * 2, done.stdout


DOCUMENTS = """
import torch
from kernel_index.core import device_documents as of
from kernel_index.core.triton import documents, documents_backward, launch
from kernel_index.proofs import aot
def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")
q, k, out = empty(2, 4096, 32, 128), empty(2, 4096, 8, 128), empty(2, 4096, 32, 128)
lse = empty(2, 4096, 32, dtype=torch.float32)
bounds, strides, scoring = (empty(2, 4096, dtype=torch.int32),) * 3, launch.strides(k, k), of.Scoring(0.1, 0.0)
def show(kernel, made, *args):
    found = aot.compile_for("documents", aot._launch(kernel, args, made.constants), "sm90")
    print(found.error or "compiled")
bits = empty(2, 4096, 8, 3, dtype=torch.int32)
chosen = scoring._replace(block=64)
for queries, page, scoring, bits in ((4096, 0, scoring, None), (1, 16, scoring, None), (4096, 0, chosen, bits)):
    made = of._launch_of("forward", q[:, :queries], k, k, scoring, HAS_SINK=False, PAGE=page, AGAIN=bits is None)
    table, steps = (bounds[0], (4096, 1)) if page else (None, (0, 0))
    show(documents.documents_kernel, made, q, k, k, None, *bounds, table, bits, out, lse, *strides, 4096, 4096, *steps,
         *of._of_bits(bits), queries, 8, made.inner, made.outer)
for bits, scoring in ((None, scoring._replace(block=0)), (bits, chosen)):
    made = of._launch_of("queries", q, k, k, scoring, HAS_D_LSE=False, AGAIN=bits is None)
    show(documents_backward.queries_kernel, made, q, None, q, k, k, out, lse, *bounds, bits, q, lse, *strides, 4096,
         4096, *of._of_bits(bits), 4096, 8, made.scale, made.inner, made.outer)
    made = of._launch_of("keys", q, k, k, scoring, H=32, AGAIN=bits is None)
    show(documents_backward.keys_kernel, made, q, q, k, k, lse, lse, *bounds, bits, k, k, *strides, 4096,
         4096, *of._of_bits(bits), 4096, 8, made.scale, made.inner, made.outer)
"""


@pytest.mark.thorough
def test_attention_by_documents_compiles():
    """No suite calls it in the mode that it is for; an interpreter would not see what a compiler refuses."""
    done = not_interpreted("-c", DOCUMENTS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["compiled"] * 7

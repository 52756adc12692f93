"""Every launch says whether products and sums are fused, and the compiler obeys: without the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_index.core.target import has_package

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not has_package("triton"), reason="needs the triton package")

EVERY_LAUNCH = """
from kernel_index.core.testing import suites
from kernel_index.core.triton.jit import Kernel
from kernel_index.proofs import aot
ops = ("attention", "fused_relu_squared", "fused_residual_add_rms_norm")
found = [l for s in suites() if s.op in ops for l in aot.launches(s, aot.TARGETS["sm90"])]
for launch in found:
    assert isinstance(launch.kernel, Kernel), launch.kernel
    assert ("enable_fp_fusion", True) in launch.options, launch.kernel
print(len(found))
"""

COMPILED = """
import torch, triton
from kernel_index.proofs import aot
from tests.proofs import kernels
args = tuple(torch.empty(1024, device="meta") for _ in range(2))
options = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": FUSED}
launch = aot._launch(kernels.product_and_sum_kernel, args, options)
source = aot.ASTSource(launch.kernel, dict(launch.signature), constexprs=dict(launch.constants))
built = triton.compile(source, target=aot.GPUTarget("cuda", 90, 32), options=dict(launch.options))
assert built.metadata.enable_fp_fusion is FUSED
print(built.asm["ptx"])
"""


def run(code: str, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.thorough_if(when=lambda default: default == "1")
@pytest.mark.parametrize("default", ["0", "1"])
@pytest.mark.thorough
def test_launches_say_that_products_and_sums_are_fused(default):
    """Whatever Triton's default is."""
    assert int(run(EVERY_LAUNCH, TRITON_DEFAULT_FP_FUSION=default)) >= 6


def test_the_compiler_obeys():
    assert "fma.rn.f32" in run(COMPILED.replace("FUSED", "True"), TRITON_DEFAULT_FP_FUSION="0")
    assert "fma.rn.f32" not in run(COMPILED.replace("FUSED", "False"), TRITON_DEFAULT_FP_FUSION="1")


def test_no_kernel_is_decorated_otherwise():
    names = [p for p in (ROOT / "kernel_index").rglob("*.py") if "@triton.jit" in p.read_text()]
    assert names == []

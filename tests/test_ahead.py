"""Kernels that threads compile while torch.compile traces: the right ones, once, and nothing is started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]

PRETENDED = """
import concurrent.futures, logging, os
from types import SimpleNamespace

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import kernel_index as ki
from kernel_index.core import ahead
from kernel_index.core.target import pretend
from kernel_index.core.triton import jit
from kernel_index.kernels.experts.fused_relu_squared import triton as kernels
from kernel_index.proofs.aot import TARGETS

# It cannot load a kernel: whatever launches one fails.
place = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device=0: 0)
place.get_current_target = lambda: GPUTarget("cuda", 90, 32)
driver.set_active(place)
threads = concurrent.futures.ThreadPoolExecutor(1)
compiled, found, said = [], [], []
def listen(*, src, cache_hit, **_):
    (found if cache_hit else compiled).append(src.name)
triton.knobs.compilation.listener = listen
logging.getLogger("kernel_index").setLevel(logging.DEBUG)
logging.getLogger("kernel_index").addHandler(type("Seen", (logging.Handler,), {"emit": lambda _, r: said.append(r)})())

def squares(x):
    return ki.fused_relu_squared(x, backend="triton")

turn = 0  # sizes differ from question to question: what is known of one tells nothing in another

def x(times=1, dtype=torch.bfloat16):
    return torch.empty(times * turn, 512, dtype=dtype, device="meta", requires_grad=True)

def traced(given):
    torch._dynamo.reset()
    with pretend(TARGETS["sm90"]):
        return torch.compile(squares, fullgraph=True, backend="aot_eager", dynamic=False)(given)

def finished():
    for futures in ahead._PENDING.values():
        for future in futures.values():
            future.result()

# In the order of the decorator: Triton tells kernels apart by it.
HOW = {"enable_fp_fusion": jit.ENABLE_FP_FUSION, "BLOCK": kernels.BLOCK, "num_warps": kernels.NUM_WARPS}
BOTH = ["_relu_squared_backward_kernel", "_relu_squared_kernel"]

def begin(folder):
    global turn
    turn += 1
    os.environ["TRITON_CACHE_DIR"] = folder
    for kernel in (kernels._relu_squared_kernel, kernels._relu_squared_backward_kernel):
        kernel.device_caches.clear()
    ahead._PENDING.clear()
    ahead._threads = lambda: threads
    for seen in (compiled, found, said):
        seen.clear()
"""

QUESTIONS = {
    "a trace has forward and backward compiled, once": """
traced(x())
finished()
assert sorted(compiled) == BOTH, compiled
traced(x())
finished()
assert sorted(compiled) == BOTH and not found, (compiled, found)
""",
    "a launch of the same kind finds what was compiled, and a later trace does not launch it": """
traced(x())
given = torch.empty_like(x())
kernels._relu_squared_kernel.run(given, given, given.numel(), grid=(16,), warmup=True, **HOW)
finished()
assert not found and sorted(compiled) == BOTH, (found, compiled)
traced(x(2))
finished()
assert len(compiled) == 2 and not found, (compiled, found)
""",
    "another kind is compiled where it is launched": """
traced(x())
finished()
given = torch.empty_like(x(dtype=torch.float32))
kernels._relu_squared_kernel.run(given, given, given.numel(), grid=(16,), warmup=True, **HOW)
finished()
assert not found and len(compiled) == 3, (found, compiled)
""",
    "what fails in a thread is left to the launch": """
def fail():
    raise RuntimeError("no compiler here")
ahead._threads = lambda: SimpleNamespace(submit=lambda _: threads.submit(fail))
traced(x())
given = torch.empty_like(x())
kernels._relu_squared_kernel.run(given, given, given.numel(), grid=(16,), warmup=True, **HOW)
assert compiled == ["_relu_squared_kernel"], compiled
""",
    "fake tensors without a compiler compile nothing": """
with pretend(TARGETS["sm90"]), FakeTensorMode():
    torch.ops.kernel_index.relu_squared(torch.empty(64, 512, device="meta"))
assert not compiled and not ahead._PENDING
""",
}


ALL = """
for name, (folder, question) in QUESTIONS.items():
    begin(folder)
    print(name)
    exec(question)
    assert not said, said[0].getMessage()
"""


def test_ahead(tmp_path):
    """In a process of its own: here Triton's functions are interpreted.  One for all questions, since it is slow."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    asked = {name: (str(tmp_path / str(i)), question) for i, (name, question) in enumerate(QUESTIONS.items())}
    command = [sys.executable, "-c", f"{PRETENDED}\nQUESTIONS = {asked!r}\n{ALL}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == len(QUESTIONS)

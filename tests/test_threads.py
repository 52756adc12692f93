"""Threads and forked workers that call kernels at once get what one thread gets."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import kernel_index as ki
from kernel_index.core.locks import ThreadLock
from tests.mixed_calls import mixed_calls, same

THREADS = 4
SIZES = (8, 13)
INTERPRETED = ("gather_rows", "fused_residual_add_rms_norm", "fused_linear_cross_entropy", "fused_bias_dropout_add")
COMPILED = ("fused_relu_squared", "fused_residual_add_rms_norm")


def in_threads(work) -> list:
    """What ``work(i)`` returns in each of the threads, which begin at the same time."""
    ready = threading.Barrier(THREADS)

    def together(i):
        ready.wait(60)
        return work(i)

    with ThreadPoolExecutor(THREADS) as pool:
        return [future.result(timeout=300) for future in [pool.submit(together, i) for i in range(THREADS)]]


def chosen_calls():
    slow = {"triton": INTERPRETED, "inductor": COMPILED}
    return [c for c in mixed_calls() if c.suite.op in slow.get(c.backend, (c.suite.op,))]


def test_threads_get_the_bits_of_one_thread_and_their_own_receipts():
    """Forward and backward of every function at once, each thread in another order."""
    calls = chosen_calls()
    alone = {str(c): [c.results(n) for n in SIZES] for c in calls}

    def work(i):
        wrong, strange = [], []
        for call in calls[i * 7 :] + calls[: i * 7]:
            for n, expected in zip(SIZES, alone[str(call)], strict=True):
                with ki.receipts(every_thread=False) as log:
                    wrong += [] if same(call.results(n), expected) else [f"{call} at {n}"]
                outer = [r for r in log if r.op == call.suite.op]
                strange += [] if [r.ran for r in outer] == [call.backend] else [(str(call), log)]
        return wrong, strange

    assert in_threads(work) == [([], [])] * THREADS
    assert len(calls) > 40


def test_a_failure_in_one_thread_is_that_threads_alone():
    x, wide = torch.randn(64, 32), torch.randn(3, 3)

    def work(i):
        with ki.receipts(every_thread=False) as log:
            for _ in range(100):
                if i == 0:
                    try:
                        ki.fused_relu_squared(wide, backend="no such backend")
                    except ki.Ineligible:
                        continue
                ki.fused_relu_squared(x)
        return [r.ran for r in log]

    assert in_threads(work) == [[]] + [["reference"] * 100] * (THREADS - 1)


# Forks


def test_a_fork_opens_the_lock_that_another_thread_holds():
    lock, inside, go_on = ThreadLock(), threading.Event(), threading.Event()

    def holder():
        with lock.held():
            inside.set()
            go_on.wait(60)

    thread = threading.Thread(target=holder)
    thread.start()
    assert inside.wait(60)
    child = os.fork()
    if child == 0:
        free = lock._lock.acquire(timeout=10)
        os._exit(0 if free else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert not lock._lock.acquire(timeout=0.01), "here it is still held"
    go_on.set()
    thread.join()


WORKERS = """
import sys, torch
from torch.utils.data import DataLoader, Dataset
import kernel_index as ki
from tests.mixed_calls import mixed_calls, same

torch.set_num_threads(2)
big = torch.randn(512, 512, requires_grad=True)
ki.fused_relu_squared(big, backend="inductor").sum().backward()  # a region compiled for two threads, and run on them
torch.randn(700, 700) @ torch.randn(700, 700)
calls = [c for c in mixed_calls() if c.backend not in ("triton", "inductor")]
calls += [c for c in mixed_calls() if str(c) in ("fused_relu_squared-inductor", "gather_rows-triton")]

class Calls(Dataset):
    def __len__(self):
        return len(calls)

    def __getitem__(self, i):
        with ki.receipts() as log:
            found = calls[i].results(8)
        assert calls[i].backend in [r.ran for r in log]
        return [torch.empty(0) if t is None else t for t in found]

assert torch.get_num_threads() == 2
loader = DataLoader(Calls(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=150)
for repeat in range(2):
    for call, found in zip(calls, loader, strict=True):
        ki.fused_relu_squared(big, backend="inductor")  # the parent goes on meanwhile
        torch.set_num_threads(1)  # as in a worker
        expected = [torch.empty(0) if t is None else t for t in call.results(8)]
        torch.set_num_threads(2)
        assert same(found, expected), str(call)
print("served", len(calls))
"""


@pytest.mark.thorough
def test_forked_workers_of_a_data_loader_call_kernels():
    """After the parent has compiled regions and run OpenMP's threads, which a forked child does not have."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", WORKERS], capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > 35

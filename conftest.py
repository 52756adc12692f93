"""For tests and doctests alike: JAX runs on the CPU, modules whose package is missing are not collected, and --part."""

import importlib.util
import os
import re
import zlib

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an installed libtpu would search for TPUs

collect_ignore_glob: list[str] = []
if importlib.util.find_spec("jax") is None:
    collect_ignore_glob += ["kernel_index/jax/*"]
if importlib.util.find_spec("cutlass") is None:  # the language of flash-attn-4
    collect_ignore_glob += ["kernel_index/kernels/attention/dense_attention/fa4_predicates.py"]


def pytest_addoption(parser):
    parser.addoption("--part", default="1/1", help="i/n: the i-th of n parts of the tests; each test is in one of them")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    chosen = config.getoption("--part")
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", chosen)
    if match is None or int(match[1]) > int(match[2]):
        raise pytest.UsageError(f"--part must be i/n with 1 ≤ i ≤ n, got {chosen}")
    part, parts = int(match[1]), int(match[2])
    others = [item for item in items if zlib.crc32(item.nodeid.encode()) % parts != part - 1]
    if others:
        config.hook.pytest_deselected(items=others)
        left_out = set(others)
        items[:] = [item for item in items if item not in left_out]

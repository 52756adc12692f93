"""Hundreds of mixed calls leave nothing behind; ``--hypothesis-profile nightly`` makes it a thousand."""

import json
import os
import subprocess
import sys

import pytest

from tests.leaks import SIZES
from tests.mixed_calls import mixed_calls, same

KEPT = 6 * 2**20
"""Bytes that the allocator may keep, give or take; 1,000 tensors of a few kilobytes would be twice that."""


@pytest.mark.thorough
def test_mixed_calls_leak_nothing(request):
    every_one = 12 * sum(call.backend == "triton" for call in mixed_calls())  # a Triton call comes after eleven others
    count = 1000 if request.config.getoption("--hypothesis-profile") == "nightly" else every_one
    command = [sys.executable, "-m", "tests.leaks", str(count)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout.splitlines()[-1])
    assert grown.pop("kinds of calls") == len(mixed_calls())
    assert grown.pop("resident bytes") <= KEPT
    assert abs(grown.pop("objects")) < count // 10, "less than one object for ten calls"
    assert set(grown.values()) == {0}, grown


@pytest.mark.parametrize("call", mixed_calls(without=("inductor", "triton")), ids=str)
def test_the_same_call_gives_the_same_bits(call):
    """What the leak test and the threads are compared with."""
    for n in SIZES[:3]:
        assert same(call.results(n), call.results(n))

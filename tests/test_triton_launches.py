"""The short way of a launch takes a kernel that was compiled for arguments of the same kinds, and no other."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl

from kernel_index.core.triton import jit as launches


def scaled(x_ptr, out_ptr, N, factor, BLOCK: tl.constexpr, TWICE: tl.constexpr):
    """Never compiled here."""


class Pretended(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    is_cuda = True


class Compiled:
    """What Triton would have compiled; it notes its launches."""

    function = packed_metadata = None

    def __init__(self, known, args, constants):
        self.launched, self.made_for = [], (args, constants)
        known.append(self)

    def run(self, x, y, z, stream, function, metadata, *rest):
        self.launched.append(((x, y, z), rest[3:]))


@pytest.fixture
def compiled(monkeypatch):
    """A kernel without a GPU, and what was compiled for it."""
    known = []
    kernel = launches.Kernel(scaled)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launches, "_takes_short_way", lambda first: True)
    monkeypatch.setattr(launches, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: 7)))
    monkeypatch.setattr(kernel, "run", lambda *a, grid, warmup, enable_fp_fusion, **c: Compiled(known, a, c))
    return kernel, known


def tensor(offset=0, dtype=torch.float32):
    return torch.zeros(64, dtype=dtype)[offset:].as_subclass(Pretended)


CALL = ((tensor(), tensor(), 48, 0.5), {"BLOCK": 64, "TWICE": False, "num_warps": 4})
OTHERS = {
    "another constant": (CALL[0], CALL[1] | {"BLOCK": 32}),
    "another constant, by position": ((*CALL[0], 32), {"TWICE": False, "num_warps": 4}),
    "warps": (CALL[0], CALL[1] | {"num_warps": 8}),
    "a dtype": ((tensor(dtype=torch.int32), *CALL[0][1:]), CALL[1]),
    "an address that is no multiple of 16": ((tensor(1), *CALL[0][1:]), CALL[1]),
    "a size that is no multiple of 16": ((*CALL[0][:2], 49, 0.5), CALL[1]),
    "a size of 1": ((*CALL[0][:2], 1, 0.5), CALL[1]),
    "a size of 64 bits": ((*CALL[0][:2], 2**40, 0.5), CALL[1]),
    "an integer for a float": ((*CALL[0][:3], 2), CALL[1]),
    "none for a tensor": ((CALL[0][0], None, *CALL[0][2:]), CALL[1]),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_other_kinds_are_compiled_anew(compiled, other):
    kernel, known = compiled
    for args, constants in (CALL, other, CALL, other):
        kernel[(3, 2)](*args, **constants)
    assert len(known) == 2
    assert [len(k.launched) for k in known] == [1, 1]
    assert known[1].launched[0][0] == (3, 2, 1)


def test_positions_of_constants_count(compiled):
    """The fault that wrote this file: heads of 64 and of 128 by position, and one kernel for both."""
    kernel, known = compiled
    for block in (64, 128, 64):
        kernel[(1,)](*CALL[0], block, True, num_warps=4)
    assert [k.made_for[0][4] for k in known] == [64, 128]
    addresses = [x.data_ptr() for x in CALL[0][:2]]
    assert known[0].launched[0][1] == (*addresses, *CALL[0][2:], 64, True)


def test_values_of_the_same_kind_are_not(compiled):
    kernel, known = compiled
    for size, factor in ((48, 0.5), (96, 1.5), (16, -3.0)):
        kernel[(1,)](tensor(), tensor(), size, factor, **CALL[1])
    assert len(known) == 1
    assert [rest[2:4] for _, rest in known[0].launched] == [(96, 1.5), (16, -3.0)]


def test_a_prepared_launch_looks_at_addresses(compiled):
    kernel, known = compiled
    prepared = launches.Prepared(kernel, (5,), (48, 0.5), **CALL[1])
    for first in (tensor(), tensor(1), tensor(), tensor(1)):
        prepared(launches.place_of(first), first, tensor())
    assert [len(k.launched) for k in known] == [1, 1]
    addresses = known[0].launched[0][1][:2]
    assert all(type(a) is int for a in addresses)
    assert known[0].launched[0][1][2:] == (48, 0.5, 64, False)

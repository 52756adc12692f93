"""Gradients of documents by warps with roles: the bits of the kernels that they stand for; and that they compile."""

import operator
import os
import subprocess
import sys

import pytest
import torch

import kernel_index as ki
from kernel_index.core import device_documents

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a GPU of sm_90"
)
PLACE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (1, 300, 17, 129, 64, 7, 7, 500, 31)
MASKS = {"causal": {}, "window": {"window": (100, 0)}, "both sides": {"causal": False}}


def drawn(width, heads=(8, 2), rows=2):
    """q, k, v and an upstream gradient."""
    torch.manual_seed(0)
    groups = (heads[0], heads[1], heads[1], heads[0])
    return [torch.randn(rows, sum(LENGTHS), n, width, device=PLACE).bfloat16() for n in groups]


def documents():
    """Two rows of documents, the second in another order and padded."""
    one = torch.tensor([i for i, n in enumerate(LENGTHS) for _ in range(n)])
    other = torch.tensor([i for i, n in enumerate(LENGTHS[::-1]) for _ in range(n)])
    other[-31:] = -1
    return torch.stack((one, other)).to(PLACE)


def attended(q, k, v, upstream, mask, **options):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with ki.numerics("invariant"):
        out, lse = ki.attention_with_lse(*leaves, mask, **options)
    wanted = (out * upstream).sum() + lse.where(lse.isfinite(), 0).sum()
    return out.detach(), lse.detach().transpose(1, 2), *torch.autograd.grad(wanted, leaves)


@on_hopper
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("width", [64, 128])
def test_the_bits_of_documents(monkeypatch, width, kind):
    """Those of a document alone, packed, and of Triton's kernels, whose sums they are."""
    tensors, options = drawn(width), MASKS[kind]
    packed = attended(*tensors, ki.MaskContract(doc_ids=documents(), **options))
    first = 0
    for length in LENGTHS:
        part = slice(first, first + length)
        alone = attended(*(x[:1, part] for x in tensors), ki.MaskContract(**options))
        for name, one, whole in zip(("out", "lse", "dq", "dk", "dv"), alone, packed, strict=True):
            assert torch.equal(one, whole[:1, part]), (name, first)
        first += length
    monkeypatch.setattr(device_documents, "_has_roles", lambda *_: False)
    of_triton = attended(*tensors, ki.MaskContract(doc_ids=documents(), **options))
    chosen = operator.itemgetter(0, 1, 3, 4)  # delta's own sum has another order, and dQ follows it
    for name, one, other in zip(("out", "lse", "dk", "dv"), chosen(packed), chosen(of_triton), strict=True):
        assert torch.equal(one, other), name


@on_hopper
@pytest.mark.parametrize("width", [64, 128])
def test_the_gradients_are_right(width):
    tensors = drawn(width)
    mask = ki.MaskContract(doc_ids=documents())
    found = attended(*tensors, mask)
    leaves = [x.double().requires_grad_() for x in tensors[:3]]
    out, lse = ki.attention_with_lse(*leaves, mask, backend="reference")
    wanted = (out * tensors[3]).sum() + lse.where(lse.isfinite(), 0).sum()
    for one, exact in zip(found[2:], torch.autograd.grad(wanted, leaves), strict=True):
        assert (one.double() - exact).norm() / exact.norm() < 2**-7


@on_hopper
@pytest.mark.parametrize("width", [64, 128])
def test_what_a_row_does_not_see_may_be_anything(width):
    q, k, v, upstream = drawn(width)
    mask = ki.MaskContract(doc_ids=documents())
    expected = attended(q, k, v, upstream, mask)
    bad = [x.clone() for x in (q, k, v, upstream)]
    for x in bad:  # in a document of row 0, and in the padding of row 1
        x[0, 320], x[1, -5] = torch.nan, torch.inf
    found = attended(*bad, mask)
    for name, one, other in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        assert torch.equal(one[0, :318], other[0, :318]), name
        assert torch.equal(one[0, 447:], other[0, 447:]), name
        assert torch.equal(one[1, :-31], other[1, :-31]), name
    assert found[3][0, 318:321].isnan().any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted")
@pytest.mark.parametrize("written", [torch.nan, 1.0])
def test_a_tile_that_holds_a_nan_is_made_again_and_no_other(monkeypatch, written):
    """Nothing with roles runs here: its results are NaN, then numbers, wherever it would write."""
    pytest.importorskip("triton")
    from kernel_index.core.triton import hopper_keys, hopper_outputs, hopper_queries

    q, d_out = (torch.randn(1, 70, 4, 16) for _ in range(2))
    k, v = (torch.randn(1, 70, 2, 16) for _ in range(2))
    at = torch.arange(70, dtype=torch.int32)[None]
    origin = torch.where(at < 30, 0, 30).to(torch.int32)
    seen_by = at, torch.where(at < 30, 30, 70).to(torch.int32)
    scoring = device_documents.Scoring(0.25, 0.0)

    def found():
        out, lse = device_documents._launch(q, k, v, None, origin, at + 1, origin, None, None, 0, *scoring)
        given = d_out, None, q, k, v, results.get("out", out), results.get("lse", lse), origin, at + 1, origin
        d_q, delta = device_documents._launch_queries(*given, None, *scoring)
        lse, delta = results.get("lse", lse), results.get("delta", delta)
        d_kv = device_documents._launch_keys(d_out, q, k, v, lse, delta, *seen_by, origin, None, *scoring)
        return {"out": out, "lse": lse, "dq": d_q, "delta": delta, "dk": d_kv[0], "dv": d_kv[1]}

    results = {}
    results = expected = found()

    def write(*given):
        for x, name in zip(given[-1], ("out", "lse"), strict=True):
            x.fill_(written) if name == "out" else x.copy_(expected["lse"])
        return given[-1]

    def write_queries(*given):
        given[-1][0].fill_(written), given[-1][1].copy_(expected["delta"])

    monkeypatch.setattr(hopper_outputs, "forward", write)
    monkeypatch.setattr(hopper_queries, "backward_queries", write_queries)
    monkeypatch.setattr(hopper_keys, "backward_keys", lambda *given: [x.fill_(written) for x in given[-1]])
    monkeypatch.setattr(device_documents, "_has_roles", lambda *_: True)
    again = found()
    for name in ("out", "dq", "dk", "dv"):
        wanted = expected[name] if written != written else torch.ones_like(expected[name])
        assert torch.equal(again[name], wanted), name


COMPILE = """
import torch
from kernel_index.core.triton import hopper_keys, hopper_outputs, hopper_queries
from kernel_index.core.triton.hopper import QuickHopperKernel
from kernel_index.proofs import aot
def record(kernel, grid):
    def launch(*args, **options):
        found = aot.compile_for("documents", aot._launch(kernel, args, options), "sm90")
        print(found.error or "compiled", found.spilled)
    return launch
QuickHopperKernel.__getitem__ = record
for width in (64, 128):
    q, k = (torch.empty(2, 4096, heads, width, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    numbers = torch.empty(2, 32, 4096, device="meta").transpose(1, 2)
    bounds = (torch.empty(2, 4096, dtype=torch.int32, device="meta"),) * 3
    hopper_outputs.forward(q, k, k, bounds, 64, 0.1, (q, numbers))
    hopper_queries.backward_queries(q, numbers, q, k, k, q, numbers, bounds, 0.1, (q, numbers))
    hopper_keys.backward_keys(q, q, k, k, numbers, numbers, bounds, 0.1, (k, k))
"""


@pytest.mark.thorough
def test_they_compile_and_keep_registers():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        said, stored = line.split()
        assert said == "compiled"
        assert int(stored) <= 160, "bytes that do not find a register"
    assert len(done.stdout.splitlines()) == 6

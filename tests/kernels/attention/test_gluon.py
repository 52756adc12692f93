"""The kernels for Hopper: what they take, that they compile without a GPU, and, on one, their results."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import kernel_index as ki
from kernel_index.core import target
from kernel_index.core.attention_function import Backward
from kernel_index.core.target import Target, has_package
from kernel_index.kernels.attention.dense_attention import gpu_rules
from kernel_index.kernels.attention.dense_attention.contract import AttentionCall
from tests.kernels.attention.on_a_gpu import MASKS, compare_on_a_gpu, leaves_of, sink_of

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a GPU of sm_90"
)


def call_of(*, width=64, value_width=None, dtype=torch.bfloat16, mask=None, tokens=8):
    q, k = (torch.empty(1, tokens, heads, width, dtype=dtype) for heads in (4, 2))
    v = torch.empty(1, tokens, 2, value_width or width, dtype=dtype)
    return AttentionCall(q, k, v, mask or ki.MaskContract(), None, 0.0, None, False)


TREE = ki.MaskContract(subtree_end=ki.pack_tree([-1, 0, 0], [4, 2, 2]).subtree_end)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (call_of(width=96), "takes heads of 64 and 128"),
        (call_of(value_width=32), "takes heads of 64 and 128"),
        (call_of(dtype=torch.float32), "takes float16 and bfloat16"),
        (call_of(mask=TREE), "goes by intervals of keys: a tree has none"),
        (call_of(tokens=0), "needs at least one query and one key"),
        (call_of()._replace(scale=-0.1), "takes scales above 0: it compares scores before they are scaled"),
        (call_of()._replace(scale=0.0), "takes scales above 0: it compares scores before they are scaled"),
    ],
    ids=["width", "value_width", "dtype", "tree", "empty", "negative", "zero"],
)
def test_what_it_declines(monkeypatch, call, reason):
    monkeypatch.setattr(gpu_rules, "target_of", lambda device: Target("cuda", 90))
    assert gpu_rules.gluon_why_not(call) == reason


def test_other_architectures(monkeypatch):
    for other in (Target("cuda", 100), Target("cuda", 80), Target("hip", "gfx942"), Target("cpu", None)):
        monkeypatch.setattr(gpu_rules, "target_of", lambda device, other=other: other)
        assert gpu_rules.gluon_why_not(call_of()) == "its kernels are made of instructions that only sm_90 has"


@pytest.mark.parametrize(("version", "found"), [("3.5.1", (3, 5)), ("3.7.0+git1234", (3, 7)), ("4.0", (4, 0))])
def test_the_version_of_triton(monkeypatch, version, found):
    """Whatever its distribution is called: nightly builds of PyTorch bring one of another name."""
    monkeypatch.setattr(target, "has_package", lambda name: True)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    assert target._ask_triton.__wrapped__() == found


def test_older_versions_of_triton(monkeypatch):
    monkeypatch.setattr(gpu_rules, "target_of", lambda device: Target("cuda", 90))
    monkeypatch.setattr(gpu_rules, "triton_version", lambda: (3, 5))
    assert gpu_rules.gluon_why_not(call_of()) == "needs Triton 3.6 or later"


@pytest.fixture
def gluon():
    """The module, on a machine with Triton: its launchers need no GPU."""
    pytest.importorskip("triton")
    return importlib.import_module("kernel_index.kernels.attention.dense_attention.gluon")


def test_dense_memory_that_is_not_aligned_is_copied(gluon):
    """A part of a flat buffer is contiguous wherever it begins; the copy engine begins at multiples of 16 bytes."""
    flat = torch.arange(1 + 2 * 8 * 2 * 64, dtype=torch.bfloat16)
    x = flat[1:].view(2, 8, 2, 64)
    assert x.is_contiguous()
    found = gluon._tiles(x)
    assert gluon.has_tiles(found)
    assert torch.equal(found, x)
    assert gluon._tiles(found) is found


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("rows", [1, 3])
def test_numbers_of_every_head_begin_aligned(gluon, rows, heads):
    """Also where there is one head of one row: a tensor flattened to one row has the stride of its length."""
    x = gluon._rows_like(torch.empty(rows, 5, heads, 64))
    found = gluon.backward_kernels.rows_of(x, 64)
    assert found.base.data_ptr() == x.data_ptr()
    assert (found.shape, found.strides) == ([rows * heads, 5], [64, 1])


@pytest.fixture
def launches(gluon, monkeypatch):
    """The arguments of the backward launches, of which none runs, by the name of the launcher."""
    seen = {}
    for name in ("backward_queries", "backward_keys"):
        signature = inspect.signature(getattr(gluon.backward_kernels, name))

        def record(*args, name=name, signature=signature):
            seen[name] = signature.bind(*args).arguments
            return seen[name]["outputs"]

        monkeypatch.setattr(gluon.backward_kernels, name, record)
    return seen


def given_to_backward(tokens=100, **changed):
    q, k = (torch.ones(2, tokens, heads, 64, dtype=torch.bfloat16) for heads in (4, 2))
    start, end = torch.zeros(1, tokens, dtype=torch.int32), torch.arange(1, tokens + 1, dtype=torch.int32)[None]
    saved = torch.randn(2, 4, tokens), start, end, start, end
    return Backward(q, None, q, k, k, None, q, saved, (True, True, True, False))._replace(**changed)


def test_saved_numbers_that_come_back_without_gaps(gluon, launches):
    """As ``torch.autograd.graph.save_on_cpu`` gives them back: the kernels read lse and delta with one stride."""
    given = given_to_backward()
    gluon._backward(gluon.Statics(gluon.Scoring(None, 0.0), False), given)
    of_queries, of_keys = launches["backward_queries"], launches["backward_keys"]
    for lse, delta in ((of_queries["lse"], of_queries["outputs"][1]), (of_keys["lse"], of_keys["delta"])):
        assert lse.stride() == delta.stride() == (512, 128, 1)
        assert torch.equal(lse, given.saved[0])


def test_padding_has_no_influence_on_gradients(gluon, launches):
    """NaN in queries that see nothing, and in their gradient from above, is not multiplied with weights of 0."""
    start, end = given_to_backward().saved[1:3]
    end = end.clone()
    end[:, 70:] = 0
    q = torch.ones(2, 100, 4, 64, dtype=torch.bfloat16)
    q[:, 70:] = float("nan")
    given = given_to_backward(q=q, d_out=q, saved=(torch.zeros(2, 4, 100), start, end, start, end))
    gluon._backward(gluon.Statics(gluon.Scoring(None, 0.0), True), given)
    for arguments in launches.values():
        for x in (arguments["q"], arguments["d_out"]):
            assert torch.equal(x[:, :70], q[:, :70])
            assert (x[:, 70:] == 0).all()


@pytest.mark.parametrize(
    ("ids", "expected"), [([[0] * 5 + [1] * 3], False), ([[0] * 5 + [1] * 2 + [-1]], True)], ids=["none", "one"]
)
def test_padding_that_the_host_knows_of(ids, expected):
    """Documents without padding need no copies of queries, if they were described on the host."""
    mask = ki.MaskContract(doc_ids=torch.tensor(ids))
    q = torch.empty(1, 8, 4, 64, device="meta")
    assert call_of(mask=mask.to("meta"))._replace(q=q, k=q).may_have_padding is expected
    on_the_device = ki.MaskContract(doc_ids=torch.empty(1, 8, dtype=torch.int64, device="meta"))
    assert call_of(mask=on_the_device)._replace(q=q, k=q).may_have_padding


def test_a_trace_computes_no_bounds_of_a_tree_to_decline_it(monkeypatch):
    """Nor does it compare a scale that may be a symbol."""
    monkeypatch.setattr(gpu_rules, "target_of", lambda device: Target("cuda", 90))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(ki.MaskContract, "row_bounds", lambda *_: pytest.fail("bounds of a tree"))
    found = gpu_rules.gluon_why_not(call_of(mask=TREE)._replace(scale=-1.0))
    assert found == gpu_rules.NO_OPERATOR


def test_a_graph_of_operators_has_no_hole(monkeypatch):
    """``make_fx`` would record the memory of the result, and nothing that writes to it."""
    monkeypatch.setattr(gpu_rules, "target_of", lambda device: Target("cuda", 90))
    seen = []

    def trace(q: torch.Tensor) -> torch.Tensor:
        seen.append(gpu_rules.gluon_why_not(call_of()._replace(q=q)))
        return q + 1

    q = torch.zeros(1, 8, 4, 64, dtype=torch.bfloat16)
    make_fx(trace)(q)
    torch.jit.trace(trace, q, check_trace=False)
    trace(q)
    assert seen[:2] == [gpu_rules.NO_OPERATOR] * 2
    assert seen[2] != gpu_rules.NO_OPERATOR


def test_a_softcap_takes_any_scale(monkeypatch):
    """The scale is inside of its tanh."""
    monkeypatch.setattr(gpu_rules, "target_of", lambda device: Target("cuda", 90))
    found = gpu_rules.gluon_why_not(call_of()._replace(scale=-0.1, softcap=20.0))
    assert found != gpu_rules.gluon_why_not(call_of()._replace(scale=-0.1))


COMPILE = """
from kernel_index.core.testing import suites
from kernel_index.proofs import aot
(suite,) = [s for s in suites() if s.op == "attention"]
for launch in aot.launches(suite, aot.TARGETS["sm90"], "gluon"):
    found = aot.compile_for("attention", launch, "sm90")
    print(found.kernel, found.error or "compiled", found.registers, found.spilled)
"""


@pytest.mark.skipif(not has_package("triton"), reason="needs Triton")
def test_the_three_kernels_compile_without_a_gpu():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("_")]
    compiled = {row[0] for row in rows if row[1] == "compiled"}
    assert {"_forward_kernel", "_queries_kernel", "_keys_kernel"} <= compiled, done.stdout


@on_hopper
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (128, 64)], ids=str)
@pytest.mark.parametrize(("softcap", "with_sink"), [(0.0, False), (20.0, False), (0.0, True)])
@pytest.mark.parametrize("name", sorted(MASKS.keys() - {"tree"}))
def test_against_the_reference(name, softcap, with_sink, widths):
    sink = sink_of(8) if with_sink else None
    compare_on_a_gpu(
        MASKS[name]().to("cuda"), leaves_of(2, 700, 2, *widths), softcap=softcap, sink=sink, backend="gluon"
    )


@on_hopper
@pytest.mark.parametrize("sizes", [(1, 1), (1, 700), (64, 64), (129, 257), (300, 100)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_sizes(sizes, causal):
    """Fewer queries than keys and more; rows without a key; a part of a tile."""
    queries, keys = sizes
    compare_on_a_gpu(ki.MaskContract(causal=causal), leaves_of(3, queries, 2, 64, keys=keys), backend="gluon")


@on_hopper
def test_layouts():
    """Parts of one product, heads before tokens, and an expanded head, which the copy engine does not take."""
    fused = torch.randn(2, 200, 12 * 64, device="cuda", dtype=torch.bfloat16).view(2, 200, 12, 64)
    q, k, v = (x.detach().requires_grad_() for x in fused.split([8, 2, 2], 2))
    compare_on_a_gpu(ki.MaskContract(), [q, k, v], backend="gluon")
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v))
    compare_on_a_gpu(ki.MaskContract(), [q, k, v], backend="gluon")
    k, v = (x.detach()[:, :, :1].expand(-1, -1, 2, -1).requires_grad_() for x in (k, v))
    compare_on_a_gpu(ki.MaskContract(), [q, k, v], backend="gluon")


@on_hopper
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_excluded_has_no_influence(bad):
    """NaN in one document: rows and gradients of the others have the same bits, its own rows that see it are NaN."""
    ids = torch.tensor([[0] * 150 + [1] * 90 + [2] * 160], device="cuda")
    leaves = leaves_of(1, 400, 2, 64)
    spoiled = [x.detach().clone() for x in leaves]
    for x in spoiled[1:]:
        x[:, 200] = bad
    up = torch.randn(1, 400, 8, 64, device="cuda", dtype=torch.bfloat16)
    found = []
    for inputs in (leaves, [x.requires_grad_() for x in spoiled]):
        out = ki.attention(*inputs, ki.MaskContract(doc_ids=ids), backend="gluon")
        found.append([out, *torch.autograd.grad(out, inputs, up)])
    others = ids[0] != 1
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean[:, others], dirty[:, others])
    assert found[1][0][:, 200:240].isnan().all()
    assert torch.equal(found[0][0][:, 150:200], found[1][0][:, 150:200])


@on_hopper
def test_the_same_bits_again():
    leaves = leaves_of(2, 1500, 2, 128)
    up = torch.randn(2, 1500, 8, 128, device="cuda", dtype=torch.bfloat16)
    runs = []
    for _ in range(4):
        out = ki.attention(*leaves, ki.MaskContract(window=(300, 0)), backend="gluon")
        runs.append([out, *torch.autograd.grad(out, leaves, up)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))

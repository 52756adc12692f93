"""The kernels of the lists for Hopper: that they compile without a GPU, and, on one, their results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernel_index as ki
from kernel_index.core.target import has_package
from kernel_index.kernels.sparse.block_sparse_attention import lists, plan
from kernel_index.kernels.sparse.block_sparse_attention.api import block_sparse_attention
from kernel_index.proofs.errors import relative_error

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a GPU of sm_90"
)

MASKS = {
    "causal": ki.MaskContract(),
    "documents": ki.MaskContract(doc_ids=torch.arange(900) // 217),
    "window": ki.MaskContract(window=(150, 0)),
    "full": ki.MaskContract(causal=False),
}


@pytest.fixture
def segments(monkeypatch):
    """Several segments and parts of lists."""
    monkeypatch.setattr(lists, "BOTH_EVERYWHERE", True)
    monkeypatch.setattr(lists, "PARTIAL_BYTES", 1)
    monkeypatch.setattr(lists, "FEWEST", 128)
    monkeypatch.setattr(lists, "PART_ROWS", {"forward": 512, "backward": 512})


def draw(heads, kv_heads, groups, width, block):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16)

    q, k, v = (normal(2, 900, n, width) for n in (heads, kv_heads, kv_heads))
    selected = torch.randint(-1, -(-900 // block), (2, 900, groups, 6), generator=generator, device="cuda")
    selected[..., 0] = selected[:, ::16, :, 0].repeat_interleave(16, 1)[:, :900]  # one that neighbours share
    return [q, k, v], selected, [normal(*q.shape), normal(2, heads, 900).float()]


def results(tensors, upstream, backend, dtype, **call):
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    out, lse = block_sparse_attention(*leaves, backend=backend, **call)
    lse = torch.where(lse.isinf(), 0.0, lse)
    upstream = [g.to(x.dtype) for g, x in zip(upstream, (out, lse), strict=True)]
    return [x.detach() for x in (out, lse)] + list(torch.autograd.grad([out, lse], leaves, upstream))


@on_hopper
@pytest.mark.parametrize("waste", [0, 2.2, 99])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "groups", "width", "block"),
    [
        (32, 4, 4, 128, 64),
        (8, 4, 8, 128, 64),
        (32, 2, 2, 128, 64),
        (8, 4, 4, 64, 64),
        (16, 2, 2, 128, 16),
        (8, 1, 1, 128, 128),
    ],
)
def test_values_and_gradients(heads, kv_heads, groups, width, block, mask, softcap, waste, segments, monkeypatch):
    """0: all tiles that select something go by lists; 99: all tiles of a group go by unions."""
    monkeypatch.setattr(lists, "use_lists", lambda cut, *_: cut.group == 1)
    monkeypatch.setattr(plan, "WASTE", waste)
    tensors, selected, upstream = draw(heads, kv_heads, groups, width, block)
    call = {"selected": selected, "block_size": block, "mask": MASKS[mask].to("cuda"), "softcap": softcap}
    got, again = (results(tensors, upstream, "triton", torch.bfloat16, **call) for _ in range(2))
    want = results(tensors, upstream, "reference", torch.float32, **call)
    plain = results(tensors, upstream, "reference", torch.bfloat16, **call)
    for mine, same, theirs, exact in zip(got, again, plain, want, strict=True):
        assert torch.equal(mine, same)
        if mine.dtype == torch.float32:  # log-sum-exp, of products that are exact
            assert relative_error(mine, exact.double()) <= 2 * relative_error(theirs, exact.double()) + 2**-16
        else:
            # Weights, partial results, delta and the result are rounded to bfloat16 one after the other, and terms that
            # are random do not cancel: each rounding is at most 2^-9 of the norm.
            assert (mine.double() - exact).norm() <= 4 * 2**-9 * exact.norm()


@on_hopper
def test_a_consumer_that_skips_many_blocks_of_a_union(monkeypatch):
    """Half of a tile selects the first block and its own alone, the other half up to 31 blocks between them.

    The first half holds a slot of the ring meanwhile, for which the producer waits.
    """
    monkeypatch.setattr(lists, "BOTH_EVERYWHERE", True)
    monkeypatch.setattr(plan, "WASTE", 99)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, upstream = (
        torch.randn(1, 1024, heads, 128, generator=generator, device="cuda").to(torch.bfloat16)
        for heads in (8, 1, 1, 8)
    )
    token = torch.arange(1024, device="cuda")
    between = torch.randint(0, 64, (1024, 1, 4), generator=generator, device="cuda").minimum(token[:, None, None] // 16)
    own = torch.stack([torch.zeros_like(token), token // 16], -1)[:, None]
    selected = torch.cat([own, torch.where((token % 16 < 8)[:, None, None], -1, between)], -1)[None]
    call = {"selected": selected, "block_size": 16}
    upstream = [upstream, torch.randn(1, 8, 1024, generator=generator, device="cuda")]
    got, again = (results([q, k, v], upstream, "triton", torch.bfloat16, **call) for _ in range(2))
    want = results([q, k, v], upstream, "reference", torch.float32, **call)
    for mine, same, exact in zip(got, again, want, strict=True):
        assert torch.equal(mine, same)
        assert (mine.double() - exact).norm() <= 4 * 2**-9 * exact.norm()


@on_hopper
@pytest.mark.parametrize("what", ["k", "v"])
def test_a_query_has_the_same_bits_whatever_is_in_blocks_that_others_select(what, monkeypatch):
    """Which blocks of a union are taken together does not depend on what is not finite."""
    monkeypatch.setattr(lists, "BOTH_EVERYWHERE", True)
    monkeypatch.setattr(plan, "WASTE", 99)
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [torch.randn(1, 1024, n, 128, generator=generator, device="cuda").to(torch.bfloat16) for n in (8, 1, 1)]
    upstream = [torch.randn_like(tensors[0]), torch.randn(1, 8, 1024, generator=generator, device="cuda")]
    selected = torch.randint(0, 16, (1, 1024, 1, 4), generator=generator, device="cuda")
    others = ~((selected == 3) | (selected == 8)).any(-1)[0, :, 0]
    call = {"selected": selected, "block_size": 64}
    before = results(tensors, upstream, "triton", torch.bfloat16, **call)
    spoiled = "qkv".index(what)
    tensors[spoiled] = tensors[spoiled].clone()
    tensors[spoiled][:, [200, 530]] = float("nan")
    after = results(tensors, upstream, "triton", torch.bfloat16, **call)
    for a, b in zip(before[:3], after[:3], strict=True):  # values, log-sum-exps and the gradient of the queries
        a, b = (x[:, :, others] if x.dim() == 3 else x[:, others] for x in (a, b))
        assert torch.equal(a, b)
    assert others[512:].any()
    assert after[0].isnan().any()


@on_hopper
@pytest.mark.parametrize("waste", [0, 99])
def test_the_same_bits_whatever_part_a_program_draws(waste, monkeypatch):
    """Programs draw many parts of lists from a counter, each time in another order."""
    monkeypatch.setattr(plan, "WASTE", waste)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, upstream = (
        torch.randn(1, 16_384, heads, 128, generator=generator, device="cuda").to(torch.bfloat16)
        for heads in (32, 4, 4, 32)
    )
    selected = torch.randint(0, 256, (1, 256, 4, 16), generator=generator, device="cuda").repeat_interleave(64, 1)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def gradients():
        return torch.autograd.grad(
            block_sparse_attention(*leaves, selected=selected, block_size=64).out, leaves, upstream
        )

    first = gradients()
    for _ in range(4):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), first, strict=True))


@on_hopper
@pytest.mark.parametrize("waste", [0, 2.2, 99])
@pytest.mark.parametrize("what", ["q", "k", "v", "upstream"])
def test_what_a_mask_excludes_changes_no_bit(what, waste, segments, monkeypatch):
    monkeypatch.setattr(plan, "WASTE", waste)
    tensors, selected, upstream = draw(32, 4, 4, 128, 64)
    call = {"selected": selected, "block_size": 64, "mask": MASKS["documents"].to("cuda")}
    before = results(tensors, upstream, "triton", torch.bfloat16, **call)
    spoiled = {"q": 0, "k": 1, "v": 2}.get(what)
    target = upstream if spoiled is None else tensors
    target[spoiled or 0] = target[spoiled or 0].clone()
    target[spoiled or 0][:, 300] = float("nan")
    after = results(tensors, upstream, "triton", torch.bfloat16, **call)
    others = torch.arange(900) // 217 != 300 // 217
    for a, b in zip(before, after, strict=True):
        a, b = (x[:, :, others] if x.dim() == 3 else x[:, others] for x in (a, b))
        assert torch.equal(a, b)
    assert any(x.isnan().any() for x in after)


COMPILE = """
from kernel_index.core.testing import suites
from kernel_index.kernels.sparse.block_sparse_attention import lists
from kernel_index.proofs import aot

lists.BOTH_EVERYWHERE = True  # a proof's calls have gradients
(suite,) = (s for s in suites() if s.op == "block_sparse_attention")
for launch in aot.launches(suite, aot.TARGETS["sm90"]):
    if launch.kernel.is_gluon():
        done = aot.compile_for(suite.op, launch, "sm90")
        print(done.kernel, done.error or "compiled", done.spilled, done.unset)
"""


@pytest.mark.thorough
@pytest.mark.skipif(not has_package("triton"), reason="needs Triton")
def test_it_compiles_without_a_gpu():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    names = "_partials_kernel", "_lists_kernel", "_by_unions_kernel", "_keys_kernel"
    assert {(row[0], row[1]) for row in rows} == {(name, "compiled") for name in names}
    # What is spilled is of the path of NaN, and descriptors of tiles that stay.
    assert all(int(row[2]) <= 1024 for row in rows), rows
    assert all(int(row[3]) == 0 for row in rows), rows

"""Blocks of 1 to 128 keys, with each option alone and all together: every way of the kernels against the reference."""

import pytest
import torch

import kernel_index as ki
from kernel_index.core.testing import Maker
from kernel_index.core.triton import launch
from kernel_index.kernels.sparse.block_sparse_attention import lists
from kernel_index.proofs.errors import floor, relative_error

SIZES = (1, 4, 16, 64, 128)
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "sink": {"sink": True},
    "intervals": {"mask": True},
    "together": {"softcap": 2.0, "sink": True, "mask": True},
}
WAYS = ("unions", "lists", "both", "native", "cpu")


def take(way: str, monkeypatch) -> str:
    """The backend of a way.  Interpreted Triton takes lists, or both, where it is told to."""
    if way in ("native", "cpu"):
        return way
    if not launch.interpreting():
        pytest.skip("runs in Triton's interpreter, on a CPU")
    monkeypatch.setattr(lists, "use_lists", lambda *_: way == "lists")
    monkeypatch.setattr(lists, "BOTH_EVERYWHERE", way == "both")
    return "triton"


def options_of(m: Maker, name: str, keys: int, heads: int) -> dict:
    found = dict(OPTIONS[name])
    if "sink" in found:
        found["sink"] = m.normal(heads)
    if "mask" in found:
        found["mask"] = ki.MaskContract(window=(keys // 3, 0), q_offset=keys - QUERIES)
    return found


QUERIES, HEADS = 13, 4


def call(size: int, name: str) -> dict:
    """Some of the blocks twice, some future ones, and queries without a block."""
    m, keys = Maker(torch.float32, seed=size), max(40, 2 * size + 21)
    blocks = -(-keys // size)
    selected = m.integers(-1, blocks, 1, QUERIES, 2, min(blocks, 5))
    selected[:, 3:6] = -1
    q, (k, v) = m.normal(1, QUERIES, HEADS, 8), (m.normal(1, keys, 2, 8) for _ in range(2))
    return {"q": q, "k": k, "v": v, "selected": selected, "block_size": size, **options_of(m, name, keys, HEADS)}


def compare(function, given: dict, backend: str, entries: tuple[str, ...]) -> None:
    """Values, log-sum-exps and the gradients of both."""
    found = []
    for which in (backend, "reference"):
        leaves = {n: x.clone().requires_grad_() for n, x in given.items() if n in entries and x is not None}
        out, lse = function(**given | leaves, backend=which)
        d_out, d_lse = (torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in (out, lse))
        upstream = d_out, d_lse.masked_fill(lse.isneginf(), 0.0)
        gradients = torch.autograd.grad((out, lse), list(leaves.values()), upstream)
        found.append((out.detach(), lse.detach().masked_fill(lse.isneginf(), 1e3), *gradients))
    for actual, expected in zip(*found, strict=True):
        assert relative_error(actual, expected) <= 8 * floor(torch.float32)


@pytest.mark.thorough_if(
    when=lambda size, name, way: name != "together" or (size in (1, 128) and way in ("unions", "lists"))
)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_blocks(size, name, way, monkeypatch):
    backend, given = take(way, monkeypatch), call(size, name)
    reason = ki.explain(ki.block_sparse_attention, **given, backend=backend).verdicts[backend]
    if reason:
        pytest.skip(reason)
    compare(ki.block_sparse_attention, given, backend, ("q", "k", "v", "sink"))


@pytest.mark.thorough_if(when=lambda name, backend: name != "together")
@pytest.mark.parametrize("backend", ["triton", "cpu"])
@pytest.mark.parametrize("name", OPTIONS)
def test_tokens(name, backend):
    given = call(1, name)
    given["indices"] = given.pop("selected")
    del given["block_size"]
    if backend == "triton" and not launch.interpreting():
        pytest.skip("runs in Triton's interpreter, on a CPU")
    compare(ki.exact_token_attention_with_lse, given, backend, ("q", "k", "v", "sink"))

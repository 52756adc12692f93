"""What a mask excludes has no influence on a Triton kernel: NaN and infinity stay with the rows that may see them."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import kernel_index as ki
from kernel_index.core.triton import launch
from kernel_index.kernels.sparse.block_sparse_attention import lists
from kernel_index.kernels.sparse.block_sparse_attention.api import block_sparse_attention

interpreted = pytest.mark.skipif(not launch.interpreting(), reason="runs in Triton's interpreter, on a CPU")

T = 52  # four tiles of the interpreter's 16 rows, the last one short
NAMES = ("q", "k", "v", "d_out")


class Law(NamedTuple):
    """A mask, and which of the T tokens hold what is not finite, in every row of the batch.

    ``queries`` see none of these keys, and ``keys`` are seen by none of these queries; ``empty`` tokens see nothing and
    are seen by nothing.
    """

    mask: ki.MaskContract
    bad: slice
    queries: slice
    keys: slice
    empty: slice = slice(0, 0)


def documents(cut: int) -> Tensor:
    return (torch.arange(T) >= cut).to(torch.int32).expand(1, T)


LAWS = {
    "padding": Law(
        ki.MaskContract(validity=ki.attention_validity(valid_token_counts=torch.tensor([37]))),
        slice(37, T), slice(0, 37), slice(0, 37), slice(37, T),
    ),
    "the next document": Law(
        ki.MaskContract(doc_ids=documents(21)), slice(21, T), slice(0, 21), slice(0, 21)
    ),
    "the document before": Law(
        ki.MaskContract(doc_ids=documents(21)), slice(0, 21), slice(21, T), slice(21, T)
    ),
    "the future": Law(ki.MaskContract(), slice(40, T), slice(0, 40), slice(0, 0)),
    "beside a window": Law(ki.MaskContract(window=(5, 0)), slice(0, 7), slice(12, T), slice(13, T)),
    "behind a window on both sides": Law(
        ki.MaskContract(causal=False, window=(4, 3)), slice(20, 22), slice(26, T), slice(29, T)
    ),
}  # fmt: skip


def drawn(heads: int, kv_heads: int, dtype: torch.dtype, width: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(h: int) -> Tensor:
        return torch.randn((1, T, h, width), generator=generator).to(dtype)

    return {"q": normal(heads), "k": normal(kv_heads), "v": normal(kv_heads), "d_out": normal(heads)}


def results(function, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    q, k, v = (tensors[name].clone().requires_grad_() for name in ("q", "k", "v"))
    out, lse = function(q, k, v)
    loss, up = [out], [tensors["d_out"]]
    if lse is not None:
        loss, up = [*loss, lse], [*up, torch.ones_like(lse)]
    d_q, d_k, d_v = torch.autograd.grad(loss, [q, k, v], up)
    found = {"out": out.detach(), "d_q": d_q, "d_k": d_k, "d_v": d_v}
    return found if lse is None else {**found, "lse": lse.detach().transpose(1, 2)}


def poisoned(tensors: dict[str, Tensor], names: tuple[str, ...], rows: slice, value: float) -> dict[str, Tensor]:
    """One element of each row and head is not finite, as after an overflow; the rest keeps its values."""
    made = {name: x.clone() for name, x in tensors.items()}
    for name in names:
        made[name][:, rows, :, 3] = value
    return made


POISONS = (*((math.nan, (name,)) for name in NAMES), (math.inf, NAMES))


def hold(function, law: Law, tensors: dict[str, Tensor]) -> None:
    clean = results(function, tensors)
    for value, names in POISONS:
        got = results(function, poisoned(tensors, names, law.bad, value))
        for name, x in got.items():
            rows = law.keys if name in ("d_k", "d_v") else law.queries
            assert torch.equal(x[:, rows], clean[name][:, rows]), (name, names, value)
            nothing = -math.inf if name == "lse" else 0.0
            assert (x[:, law.empty] == nothing).all(), (name, names, value)
        if law.empty == slice(0, 0) and names != ("d_out",):  # a row that sees what is not finite does not hide it
            assert not got["out"][:, law.bad].isfinite().all(-1).any(), (names, value)


@interpreted
@pytest.mark.thorough_if(when=lambda name, softcap: not softcap)
@pytest.mark.parametrize(("name", "softcap"), [*((name, 0.0) for name in LAWS), ("the next document", 2.0)])
def test_attention(name, softcap):
    law = LAWS[name]

    def call(q, k, v):
        sink = torch.tensor([0.5, -1.0])
        return ki.attention_with_lse(q, k, v, law.mask, softcap=softcap, sink=sink, backend="triton")

    hold(call, law, drawn(2, 1, torch.bfloat16 if softcap else torch.float32))


def every_block(size: int, groups: int) -> Tensor:
    blocks = -(-T // size)
    return torch.arange(blocks).expand(1, T, groups, blocks)


SPARSE = ("padding", "the next document")


@interpreted
@pytest.mark.thorough
@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("by_lists", [False, True])
def test_block_sparse(name, by_lists, monkeypatch):
    """Every query selects every block, so that the mask alone excludes."""
    law = LAWS[name]
    if by_lists:
        monkeypatch.setattr(lists, "WASTE", 0)

    def call(q, k, v):
        selected = every_block(8, 2 if by_lists else 1)
        return block_sparse_attention(q, k, v, selected, block_size=8, mask=law.mask, backend="triton")

    hold(call, law, drawn(2, 1, torch.float32))


@interpreted
@pytest.mark.thorough
@pytest.mark.parametrize("by_lists", [False, True])
def test_blocks_that_were_not_selected(by_lists, monkeypatch):
    """The queries of a tile share a union: one that selected a block does not show it to another one."""
    if by_lists:
        monkeypatch.setattr(lists, "WASTE", 0)
    bad = slice(16, 24)
    selected = every_block(8, 2).clone()
    selected[:, 1::2][selected[:, 1::2] == 2] = -1  # odd queries do without the block

    def call(q, k, v):
        return block_sparse_attention(q, k, v, selected, block_size=8, backend="triton")

    law = Law(ki.MaskContract(), bad, slice(25, T, 2), slice(0, 0))
    tensors = drawn(2, 2, torch.float32)
    clean = results(call, tensors)
    for names in (("k",), ("v",)):
        got = results(call, poisoned(tensors, names, law.bad, math.nan))
        for name in ("out", "lse", "d_q"):
            assert torch.equal(got[name][:, law.queries], clean[name][:, law.queries]), (name, names)
        assert not got["out"][:, 24::2].isfinite().all(-1).any()


@interpreted
@pytest.mark.thorough_if(when=lambda name: name != "padding")
@pytest.mark.parametrize("name", ["padding", "the future"])
@pytest.mark.thorough
def test_exact_tokens(name):
    law = LAWS[name]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, T, (1, T, 1, 12), generator=generator)
    tokens[..., 0] = torch.arange(T)[:, None]  # its own, so that every row of what is not finite sees it

    def call(q, k, v):
        return ki.exact_token_attention(q, k, v, tokens, mask=law.mask, backend="triton"), None

    hold(call, law, drawn(2, 1, torch.float32))


@interpreted
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["padding", "the document before"])
def test_moba(name):
    """Routed by Triton, too: a mean key of another document's keys would change what is selected."""
    law = LAWS[name]

    def call(q, k, v):
        return ki.moba_attention(q, k, v, mask=law.mask, block_size=8, topk=3, backend="triton"), None

    hold(call, law, drawn(2, 1, torch.float32))


@interpreted
@pytest.mark.parametrize(("queries", "window", "bad", "rows"), [
    (1, (5, -1), slice(0, 14), slice(0, 1)),  # behind the window, in the tile that it begins in
    (3, (-1, -1), slice(19, 20), slice(0, 2)),  # the last of three new tokens is the future of the others
    (3, (4, -1), slice(0, 14), slice(1, 3)),
])  # fmt: skip
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_decoding(queries, window, bad, rows, value):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((1, n, h, 8), generator=generator) for n, h in ((queries, 2), (32, 1), (32, 1)))
    lengths = torch.tensor([20])

    def call(k, v):
        return ki.fa4_kvcache_decode(
            q, k, v, k=None, v=None, cache_seqlens=lengths, window_size=window, backend="triton"
        )

    clean = call(k, v)
    k, v = k.clone(), v.clone()
    k[:, bad, :, 3], v[:, bad, :, 3] = value, value
    k[:, 20:], v[:, 20:] = value, value  # slots of the cache that hold no token
    got = call(k, v)
    assert torch.equal(got[:, rows], clean[:, rows])
    others = [row for row in range(queries) if row not in range(*rows.indices(queries))]
    assert not got[:, others].isfinite().all(-1).any(), "a row that sees it does not hide it"

"""Attention in C++: tiles of 64 queries, blocks of 128 keys, and everything that does not fill them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernel_index as ki
from kernel_index.core.testing import Maker
from kernel_index.kernels.attention.dense_attention.cases import oracle_with_lse, qkv
from tests.kernels.attention.test_attention_backends import HEADS, check_against_oracle, gradients
from tests.masks.contracts import calls


def test_random_contracts():
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(calls(max_rows=2), HEADS, st.sampled_from([0.0, 1.5]), st.booleans())
    def check(call, heads, softcap, with_sink):
        check_against_oracle(call, heads, softcap, with_sink, torch.float32, "native", 2e-5, widths=(4, 2))

    check()


@st.composite
def long_calls(draw):
    """Several tiles and blocks, whose edges documents, windows and the ends of rows do not meet."""
    rows, queries = draw(st.integers(1, 2)), draw(st.integers(60, 300))
    keys = draw(st.one_of(st.just(queries), st.integers(1, 400)))
    ends = draw(st.lists(st.integers(1, keys), max_size=4))
    ids = sum((torch.arange(keys) >= end).long() for end in [*ends, keys])
    padding = draw(st.integers(0, keys)) if draw(st.booleans()) else 0
    ids = torch.where(torch.arange(keys) < keys - padding, ids, -1).expand(rows, -1)
    window = draw(st.tuples(*[st.one_of(st.none(), st.integers(0, 200))] * 2))
    return ki.MaskContract(draw(st.booleans()), window, doc_ids=ids), rows, queries, keys


def test_random_contracts_over_many_tiles():
    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(long_calls(), HEADS, st.sampled_from([0.0, 1.5]), st.booleans())
    def check(call, heads, softcap, with_sink):
        check_against_oracle(call, heads, softcap, with_sink, torch.float32, "native", 5e-5, widths=(8, 6))

    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_for_any_number_of_threads(dtype):
    mask = ki.MaskContract(window=(150, 0), doc_ids=(torch.arange(500) >= 333).long()[None])
    x = {n: t.requires_grad_() for n, t in qkv(Maker(dtype), 1, 500, 500, 4, 2, 16, 32).items()}
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs = ki.attention_with_lse(**x, mask=mask, backend="native")
            results.append([*outputs, *gradients(outputs, list(x.values()))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("keys", [1, 15, 16, 100, 128, 129, 300])
def test_what_lies_behind_the_last_key_is_not_read(keys):
    """Keys are read in place, and their number rounded up only where that stays inside."""
    q, k, v = qkv(Maker(torch.float32), 1, 70, keys, 2, 2, 8).values()
    around = [torch.full((1, keys + 200, 2, 8), torch.nan) for _ in range(2)]
    for inside, x in zip(around, (k, v), strict=True):
        inside[:, :keys] = x
    mask = ki.MaskContract(causal=False)
    out = ki.attention(q, around[0][:, :keys], around[1][:, :keys], mask, backend="native")
    expected, _ = oracle_with_lse(q=q.double(), k=k.double(), v=v.double(), mask=mask)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_peak_costs_the_gradient_nothing(dtype):
    """Weights come from peak and sum: a log-sum-exp of some hundreds would have lost their last digits."""
    x = qkv(Maker(dtype, seed=1), 1, 130, 130, 2, 1, 16)
    x["q"] = x["q"] * 40
    leaves = [t.clone().requires_grad_() for t in x.values()]
    exact = [t.double().requires_grad_() for t in x.values()]
    out = ki.attention(*leaves, backend="native")
    expected, _ = oracle_with_lse(**dict(zip(x, exact, strict=True)), mask=ki.MaskContract())
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = torch.autograd.grad(out, leaves[2], upstream)[0]
    want = torch.autograd.grad(expected, exact[2], upstream.double())[0]
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_the_matrix_units_are_given_back():
    """With AMX, products configure tiles; what another kernel leaves of them must not be taken for our own."""
    x = list(qkv(Maker(torch.bfloat16), 1, 64, 128, 2, 2, 32).values())
    a = torch.randn(96, 80).bfloat16()
    first = ki.attention(*x, backend="native")
    for _ in range(3):
        torch.mm(a, a.T)
        assert torch.equal(ki.attention(*x, backend="native"), first)


def test_lanes_of_a_long_row_are_all_added():
    """Few key heads and many tiles: sums for keys and values come from several lanes."""
    x = qkv(Maker(torch.float32), 1, 700, 700, 4, 2, 16)
    leaves, exact = ([t.to(d).requires_grad_() for t in x.values()] for d in (torch.float32, torch.float64))
    expected, _ = oracle_with_lse(**dict(zip(x, exact, strict=True)), mask=ki.MaskContract())
    out = ki.attention(*leaves, backend="native")
    for a, e in zip(gradients([out], leaves), gradients([expected.float()], exact), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2e-5, atol=2e-5)

"""The block-sparse core on the CPU: what the conformance cases are too small for."""

import pytest
import torch

import kernel_index as ki
from kernel_index.kernels.sparse.block_sparse_attention import cpu
from kernel_index.kernels.sparse.block_sparse_attention.api import block_sparse_attention
from kernel_index.proofs.errors import floor, relative_error

BACKENDS = pytest.mark.parametrize("backend", ["native", "cpu"])


def call(t=300, h=4, k=2, groups=2, d=16, n=5, size=16, dtype=torch.float32, key_scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(1, t, x, d, generator=g, dtype=torch.float64).to(dtype) for x in (h, k, k)]
    tensors[1] *= key_scale
    return tensors, torch.randint(-1, -(-t // size), (1, t, groups, n), generator=g), size


def gradients(tensors, selected, size, backend, **options):
    leaves = [x.clone().requires_grad_() for x in tensors]
    out, lse = block_sparse_attention(*leaves, selected, block_size=size, backend=backend, **options)
    g = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=g).to(x.dtype) for x in (out, lse)]
    return out, lse, *torch.autograd.grad([out, torch.where(lse.isinf(), 0.0, lse)], leaves, upstream)


def assert_close(actual, expected, times=8):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.isinf(), b.isinf())
        a, b = (torch.where(x.isinf(), 0.0, x) for x in (a, b))
        assert relative_error(a, b.double()) <= times * floor(a.dtype)


def as_right_as_the_reference(actual, tensors, selected, size, **options):
    """Beside float64: a reference of many keys has an error of its own, which follows the machine's products."""
    wide = gradients([x.double() for x in tensors], selected, size, "reference", **options)
    plain = gradients(tensors, selected, size, "reference", **options)
    for a, exact, eager in zip(actual, wide, plain, strict=True):
        assert torch.equal(a.isinf(), exact.isinf())
        a, exact, eager = (torch.where(x.isinf(), 0.0, x) for x in (a, exact, eager))
        assert relative_error(a, exact) <= 2 * relative_error(eager, exact) + 4 * floor(a.dtype)


@pytest.mark.parametrize(("groups", "compiled"), [(2, True), (4, False)])
@pytest.mark.thorough
def test_many_steps_give_what_the_reference_gives_and_the_same_bits_again(groups, compiled, monkeypatch):
    """The last steps are shorter; documents and a window cut blocks; the gradient of lse counts."""
    monkeypatch.setattr(cpu, "SCORE_BYTES", 1 << 15)
    if not compiled:
        monkeypatch.setattr(cpu, "FEW_STEPS", 10**6)
    tensors, selected, size = call(groups=groups)
    mask = ki.MaskContract(doc_ids=torch.arange(300) // 77, window=(120, 0))
    variants = len(cpu._weights_region.variants)
    first, second = (gradients(tensors, selected, size, "cpu", mask=mask) for _ in range(2))
    assert (len(cpu._weights_region.variants) > variants) == compiled
    assert_close(first, gradients(tensors, selected, size, "reference", mask=mask))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_scores_far_above_the_last_block_start_again_with_exact_shifts(softcap, monkeypatch):
    """Exponentials of the other blocks would overflow under the opening's shift."""
    tensors, selected, size = call(t=64, n=3, key_scale=1.0)
    tensors[1][:, :size] *= 300.0
    selected[..., 0] = 0
    passes = []
    original = cpu._shifts
    monkeypatch.setattr(cpu, "_shifts", lambda c, stop: passes.append(stop) or original(c, stop))
    actual = gradients(tensors, selected, size, "cpu", softcap=softcap)
    assert len(passes) == (1 if softcap else 2)
    assert_close(actual[:2], gradients(tensors, selected, size, "reference", softcap=softcap)[:2])
    assert all(torch.isfinite(g).all() for g in actual[2:])


@pytest.mark.thorough_if(when=lambda groups, dtype, t: groups == 4 or dtype == torch.float32 or t > 2000)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("t", [1300, 4500])
def test_native_chunks_give_what_the_reference_gives_and_the_same_bits_with_any_number_of_threads(groups, dtype, t):
    """Several chunks and lanes, tiles that are not full, a softcap; documents and a window cut blocks."""
    tensors, selected, size = call(t=t, groups=groups, size=50, dtype=dtype)
    options = {"mask": ki.MaskContract(doc_ids=torch.arange(t) // (t // 4 - 25), window=(t // 5, 0)), "softcap": 5.0}
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(gradients(tensors, selected, size, "native", **options))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    as_right_as_the_reference(results[0], tensors, selected, size, **options)


@BACKENDS
def test_every_block_picked_is_dense_attention(backend):
    tensors, _, size = call(t=130)
    every = torch.arange(9).expand(1, 130, 2, 9)
    mask = ki.MaskContract(window=(50, 0))
    dense = ki.attention_with_lse(*tensors, mask, backend="reference")
    assert_close(block_sparse_attention(*tensors, every, block_size=size, mask=mask, backend=backend), dense)


@pytest.mark.thorough_if(when=lambda backend, t: backend == "triton")
@pytest.mark.parametrize(("backend", "t"), [("native", 300), ("cpu", 300), ("reference", 300), ("triton", 20)])
def test_a_block_longer_than_everything_costs_what_there_is(backend, t):
    tensors, _, _ = call(t=t)
    first = torch.zeros(1, t, 2, 1, dtype=torch.int64)
    as_right_as_the_reference(gradients(tensors, first, 10**9, backend), tensors, first, 10**9)


@BACKENDS
def test_order_and_repetition_of_picks_do_not_matter(backend):
    tensors, selected, size = call()
    plain = gradients(tensors, selected, size, backend)
    shuffled = torch.cat([selected.flip(-1), selected, torch.full_like(selected, -1)], -1)
    assert_close(gradients(tensors, shuffled, size, backend), plain, times=2)


@BACKENDS
def test_neighbours_do_not_share_their_picks(backend):
    """Adversarial: every query of a tile picks another block, and a value that only one of them may see is huge."""
    tensors, _, size = call(t=64, n=1, size=4)
    selected = (torch.arange(64) % 16).view(1, 64, 1, 1).expand(1, 64, 2, 1)
    mask = ki.MaskContract(causal=False)
    before = block_sparse_attention(*tensors, selected, block_size=size, mask=mask, backend=backend).out
    tensors[2][:, 20:24] = 1e6  # block 5
    after = block_sparse_attention(*tensors, selected, block_size=size, mask=mask, backend=backend).out
    changed = (before != after).any(-1).any(-1)[0]
    assert torch.equal(changed, torch.arange(64) % 16 == 5)


@BACKENDS
def test_empty_queries_give_zero_and_send_nothing_back(backend):
    tensors, selected, size = call(t=40)
    selected[:, 10:20] = -1
    selected[:, 3] = 2  # the future only
    out, lse, d_q, d_k, d_v = gradients(tensors, selected, size, backend)
    for rows in (slice(10, 20), slice(3, 4)):
        assert not out[:, rows].any()
        assert lse[:, :, rows].isneginf().all()
        assert not d_q[:, rows].any()
    assert all(torch.isfinite(x).all() for x in (d_q, d_k, d_v))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"block_size": 8}, None, ""),
        ({"block_size": 64}, ValueError, "selected must be of block indices below 1, or negative for none, got"),
        ({"selected": torch.zeros(1, 40, 3, 1, dtype=torch.int64)}, ValueError, "got G = 3"),
        ({"selected": torch.zeros(1, 41, 2, 1, dtype=torch.int64)}, ValueError, "selected must be"),
        ({"selected": torch.zeros(1, 40, 2, 1)}, TypeError, "selected must be an integer tensor"),
        ({"maps": ()}, TypeError, "maps must be UnionMaps"),
        ({"softcap": -1.0}, ValueError, "softcap must be at least 0"),
    ],
)
def test_bad_calls_say_what_is_wrong(changes, error, message):
    tensors, selected, size = call(t=40, n=1)
    arguments = {"selected": selected, "block_size": size, **changes}
    if error is None:
        block_sparse_attention(*tensors, **arguments)
        return
    with pytest.raises(error, match=message):
        block_sparse_attention(*tensors, **arguments)

"""The indexer: exact and streamed, ties by index, nothing of the future, record and replay, its loss."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernel_index as ki
from kernel_index.core.triton import launch
from kernel_index.routing.lightning_indexer import chunked

MASKS = {
    "causal": ki.MaskContract(),
    "documents": ki.MaskContract(window=(30, 0), doc_ids=torch.tensor([[0] * 40 + [1] * 57 + [-1] * 3, [5] * 100])),
    "prefix": ki.MaskContract(validity=ki.attention_validity(valid_token_counts=[60, 0])),
    "not causal": ki.MaskContract(causal=False),
}


BACKENDS = pytest.mark.parametrize("backend", ["triton", "native", "chunked", "reference"])


def whole_numbers(length=100, heads=3, width=4, seed=0):
    """Small integers: every score is exact in float32 and most of them are tied."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(-2, 3, shape, generator=generator).float()

    return draw(2, length, heads, width), draw(2, length, width), draw(2, length, heads)


def by_python(q, k, w, topk, mask):
    scores = torch.einsum("btjs,btj->bts", torch.einsum("btjd,bsd->btjs", q, k).relu(), w)
    allowed = mask.dense(q.shape[0], q.shape[1], k.shape[1])[:, 0]
    out = torch.full((*scores.shape[:2], topk), -1)
    for b in range(scores.shape[0]):
        for t in range(scores.shape[1]):
            seen = allowed[b, t].nonzero()[:, 0].tolist()
            best = sorted(seen, key=lambda s, own=scores[b, t]: (-float(own[s]), s))[:topk]
            out[b, t, : len(best)] = torch.tensor(best, dtype=torch.int64)
    return out, scores


@pytest.mark.parametrize("tile", [256, 10**9])
@BACKENDS
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_exact_with_ties_to_the_smallest_index(mask, backend, tile, monkeypatch):
    monkeypatch.setattr(chunked, "ELEMENTS", tile)
    long = mask.doc_ids is None and mask.validity is None and backend != "triton"  # the interpreter takes its time
    q, k, w = whole_numbers(300 if long else 100)
    picked = ki.lightning_indexer(q, k, w, topk=7, mask=mask, backend=backend)
    expected, scores = by_python(q, k, w, 7, mask)
    assert torch.equal(picked.indices, expected)
    assert torch.equal(picked.valid, expected >= 0)
    at = scores.gather(2, expected.clamp(min=0)).masked_fill(expected < 0, -torch.inf)
    assert torch.equal(picked.scores, at)
    assert (picked.indices.dtype, picked.scores.dtype) == (torch.int64, torch.float32)


@BACKENDS
@pytest.mark.parametrize("heads", [3, 4])
def test_infinite_keys_and_heads_that_fill_no_product(heads, backend):
    """Three heads may be computed as four: of the fourth nothing counts, not 0 times infinity either."""
    if backend == "triton" and not launch.interpreting():
        pytest.skip("runs in Triton's interpreter; a GPU has a test in test_scores_that_reach_a_bound.py")
    q, k, w = whole_numbers(60, heads)
    k[:, 5, 0], k[:, 20] = -torch.inf, torch.inf
    picked = ki.lightning_indexer(q, k, w, topk=6, backend=backend)
    expected = ki.lightning_indexer(q.double(), k.double(), w.double(), topk=6, backend="reference")
    assert torch.equal(picked.indices, expected.indices)
    assert torch.equal(picked.scores.isnan(), expected.scores.isnan())


def compare_with_a_sort(every_rank, start, end, topk):
    """What the kernels select of rows of ranks [1, T, S], of equal ones the first, and in ascending order."""
    from kernel_index.routing.lightning_indexer import triton_rounds as triton
    from kernel_index.routing.topk_keys import NOTHING, pack

    size, device = every_rank.shape[2], every_rank.device
    ranks, tokens = (torch.empty(1, len(start[0]), topk, dtype=torch.int32, device=device) for _ in range(2))
    triton.select(every_rank.int(), start, end, (ranks, tokens), 0)
    at = torch.arange(size, device=device)
    seen = (at >= start[..., None]) & (at < end[..., None])
    expected = torch.where(seen, pack(every_rank, at), NOTHING).sort(-1, descending=True).values[..., :topk]
    keys = torch.where(tokens >= 0, pack(ranks.long(), tokens.long()), NOTHING)
    assert torch.equal(keys.sort(-1, descending=True).values, expected)
    last = tokens.masked_fill(tokens < 0, size)
    assert torch.equal(last.sort(-1).values, last)


@pytest.mark.skipif(
    launch.interpreting() or not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of sm_90",
)
@pytest.mark.parametrize("topk", [100, 2048, 3000])
def test_long_rows_on_hopper(topk):
    """The kernel that collects has no interpreter."""
    from kernel_index.routing.topk_keys import rank_of

    scores = torch.randn(1, 8, 20_000, generator=torch.Generator().manual_seed(0))
    scores[0, 1, ::7], scores[0, 2, 5:9], scores[0, 2, 1] = torch.nan, -torch.inf, torch.inf
    scores[0, 3], scores[0, 4] = scores[0, 3].sign(), scores[0, 4].round(decimals=2)
    start = torch.tensor([[0, 0, 0, 0, 0, 31, 77, 9001]], dtype=torch.int32)
    end = torch.tensor([[20_000, 20_000, 20_000, 20_000, 20_000, 19_999, 13_000, 18_001]], dtype=torch.int32)
    compare_with_a_sort(*(x.cuda() for x in (rank_of(scores), start, end)), topk)


def collect_by_torch(ranks, bounds, rows, found, counts):
    """In place of the kernel for Hopper, which has no interpreter; what has no place is 0."""
    start, end, bound_b, first = rows
    found.zero_()
    for b, t in itertools.product(*map(range, bounds.shape)):
        low, high = (int(x.reshape(-1)[b * bound_b + first + t]) for x in (start, end))
        size = max(1, -(-(high - low) // 4))
        for part in range(4 if bounds[b, t] > -(2**31) else 0):
            own = torch.arange(low + part * size, max(low + part * size, min(high, low + part * size + size)))
            own = own[ranks[b, t, own] >= bounds[b, t]]
            counts[b, t, part], many = len(own), found.shape[2] // 4
            found[b, t, part * many :][: min(many, len(own))] = ((ranks[b, t, own].long() << 32) | own)[:many]


@pytest.mark.skipif(not launch.interpreting(), reason="runs in Triton's interpreter, on a CPU")
@pytest.mark.parametrize("parts", ["collected", "too many are equal", "topk too large", "sampled", "a sample misleads"])
def test_the_keys_of_a_row_on_a_gpu_are_those_of_a_sort(parts, monkeypatch):
    """Rows that are hardly longer than ``topk`` and long ones, in all ways that the kernels find them."""
    from kernel_index.routing.lightning_indexer import triton_collect, triton_sample
    from kernel_index.routing.lightning_indexer import triton_rounds as triton
    from kernel_index.routing.topk_keys import rank_of

    monkeypatch.setattr(triton, "FEWEST", 16)
    monkeypatch.setattr(triton, "MOST", 8 if parts == "topk too large" else 16)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 12, 96, generator=generator)
    if parts == "too many are equal":
        scores = scores.sign()
    sampled = []
    if "sample" in parts:
        monkeypatch.setattr(triton, "is_hopper", lambda x: True)
        monkeypatch.setattr(triton_sample, "FEWEST", 32)
        monkeypatch.setattr(triton_collect, "collect", collect_by_torch)
        select = triton_sample.select
        monkeypatch.setattr(triton_sample, "select", lambda *call: (select(*call), sampled.append(call[-1][1].clone())))
    if parts == "a sample misleads":
        scores[0, 0, :8] += 9.0  # fewer than wanted reach what it says
        scores[0, 9, torch.arange(96) % 24 < 8] = -9.0  # more than there is space for
    scores[0, 3, ::7], scores[0, 4, 5:9], scores[0, 4, 1] = torch.nan, -torch.inf, torch.inf
    start = torch.tensor([[0, 5, 0, 0, 0, 0, 17, 90, 40, 3, 0, 30]], dtype=torch.int32)
    end = torch.tensor([[96, 11, 6, 96, 96, 0, 96, 96, 48, 70, 7, 96]], dtype=torch.int32)
    compare_with_a_sort(rank_of(scores), start, end, 6)
    if "sample" in parts:
        short = ((end - start)[0] <= 6).nonzero().flatten().tolist()
        left = short + [0, 9] * (parts == "a sample misleads")
        assert (sampled[0][0] == 0).nonzero().flatten().tolist() == sorted(left)


@pytest.mark.skipif(not launch.interpreting(), reason="runs in Triton's interpreter, on a CPU")
def test_a_row_of_several_programs(monkeypatch):
    from kernel_index.routing.lightning_indexer import triton_rounds as triton

    monkeypatch.setattr(triton, "SPAN", 16)
    q, k, w = whole_numbers(48)
    mask = ki.MaskContract(window=(29, 0))
    picked = ki.lightning_indexer(q, k, w, topk=7, mask=mask, backend="triton")
    assert torch.equal(picked.indices, by_python(q, k, w, 7, mask)[0])


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_no_tensor_of_all_scores_is_ever_made(monkeypatch):
    monkeypatch.setattr(chunked, "ELEMENTS", 1 << 14)
    q, k, w = whole_numbers(1024, heads=1)
    start, end = ki.MaskContract().intervals(2, 1024)
    with Largest() as largest:
        chunked.run_topk(q, k, w, start, end, 8, 0, -1, 0)
    assert largest.elements <= 2 * chunked.CHUNK * (256 + 8)
    assert largest.elements < 1024 * 1024 // 16


@BACKENDS
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_nothing_hidden_chooses(mask, backend):
    """What query t may not see changes neither its picks nor their scores, to the bit."""
    generator = torch.Generator().manual_seed(3)
    q, k, w = (torch.randn(2, 100, *n, generator=generator) for n in ((3, 8), (8,), (3,)))
    allowed = mask.dense(2, 100)[:, 0]
    before = ki.lightning_indexer(q, k, w, topk=6, mask=mask, backend=backend)
    for t in (17, 64) if backend == "triton" else (0, 17, 63, 64, 99):
        changed = torch.where(allowed[:, t, :, None], k, 1e4)
        after = ki.lightning_indexer(q, changed, w, topk=6, mask=mask, backend=backend)
        assert torch.equal(after.indices[:, t], before.indices[:, t])
        assert torch.equal(after.scores[:, t], before.scores[:, t])


def test_a_recorded_selection_is_replayed():
    q, k, w = whole_numbers()
    record = ki.lightning_indexer(q, k, w, topk=5)
    others = whole_numbers(seed=1)
    for backend in ("chunked", "reference"):
        replayed = ki.lightning_indexer(*others, topk=5, replay=record, backend=backend)
        assert torch.equal(replayed.indices, record.indices)
        scores = by_python(*others, 5, ki.MaskContract())[1]
        expected = scores.gather(2, record.indices.clamp(min=0)).masked_fill(~record.valid, -torch.inf)
        assert torch.equal(replayed.scores, expected)
        narrow = ki.lightning_indexer(
            *others, topk=5, replay=record, mask=ki.MaskContract(window=(10, 0)), backend=backend
        )
        position = torch.arange(100)[:, None]
        kept = record.valid & (record.indices >= position - 10)
        assert torch.equal(narrow.indices, torch.where(kept, record.indices, -1))
        assert torch.equal(narrow.valid, kept)


def test_the_loss_is_the_divergence_from_what_attention_does(monkeypatch):
    """Against the formula over all keys, gradient included; the attention's own tensors get none."""
    from kernel_index.routing.lightning_indexer import loss as module

    monkeypatch.setattr(module, "ELEMENTS", 2 * 4 * 2 * 8 * 7)  # chunks of 7 queries
    generator = torch.Generator().manual_seed(5)
    mask = ki.MaskContract(doc_ids=torch.tensor([[0] * 9 + [1] * 14 + [-1] * 2, [3] * 25]))
    q_idx, k_idx, w, q, k = (
        torch.randn(2, 25, *n, generator=generator, dtype=torch.float64).requires_grad_()
        for n in ((3, 5), (5,), (3,), (4, 8), (2, 8))
    )
    picked = ki.lightning_indexer(q_idx, k_idx, w, topk=4, mask=mask)
    loss = ki.lightning_indexer_loss(picked, q, k, softcap=3.0)
    allowed = torch.zeros(2, 25, 25, dtype=torch.bool)
    for b, t, n in picked.valid.nonzero().tolist():
        allowed[b, t, picked.indices[b, t, n]] = True
    z = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) * 8**-0.5
    z = (3 * (z / 3).tanh()).masked_fill(~allowed[:, None], -torch.inf)
    target = z.softmax(-1).mean(1).detach()
    index = torch.einsum("btjs,btj->bts", torch.einsum("btjd,bsd->btjs", q_idx, k_idx).relu(), w)
    index = index.masked_fill(~allowed, -torch.inf).log_softmax(-1)
    rows = [(b, t) for b in range(2) for t in range(25) if allowed[b, t].any()]
    terms = [(target[r] * (target[r].log() - index[r]))[allowed[r]].sum() for r in rows]
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(loss, expected)
    leaves = (q_idx, k_idx, w)
    for a, e in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, e)
    assert torch.autograd.grad(
        ki.lightning_indexer_loss(ki.lightning_indexer(q_idx, k_idx, w, topk=4), q, k), (q, k), allow_unused=True
    ) == (None, None)


def test_training_the_indexer_lowers_its_loss():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 48, n, 8, generator=generator) for n in (4, 2))
    q_idx, k_idx = (torch.randn(1, 48, *n, generator=generator).requires_grad_() for n in ((4, 8), (8,)))
    w = torch.rand(1, 48, 4, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([q_idx, k_idx, w], lr=0.05)
    losses = []
    for _ in range(40):
        loss = ki.lightning_indexer_loss(ki.lightning_indexer(q_idx, k_idx, w, topk=12), q, k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


REFUSALS = {
    "q_idx must be [B, T, J, D], got shape (2, 100, 4)": {"q_idx": torch.ones(2, 100, 4)},
    "k_idx must be [B, S, D] with q_idx's B and D, (2, 100, 4), got shape (2, 100, 5)": {
        "k_idx": torch.ones(2, 100, 5)
    },
    "weights must be [B, T, J] like q_idx, (2, 100, 3), got shape (2, 100, 2)": {"weights": torch.ones(2, 100, 2)},
    "weights must be torch.float32 like q_idx, or float32 beside less, got torch.float64": {
        "weights": torch.ones(2, 100, 3).double()
    },
    "topk must be at least 1, got 0": {"topk": 0},
    "topk must be an integer, got float": {"topk": 4.0},
    "mask must be a MaskContract, got Tensor": {"mask": torch.ones(3)},
    "replay must be a TokenSelection, got tuple": {"replay": (1, 2, 3)},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    good = dict(zip(("q_idx", "k_idx", "weights"), whole_numbers(), strict=True)) | {"topk": 4}
    with pytest.raises((TypeError, ValueError)) as error:
        ki.lightning_indexer(**(good | REFUSALS[message]))
    assert str(error.value) == message

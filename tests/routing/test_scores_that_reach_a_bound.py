"""The indexer on Hopper, whose scores are never stored in full: a sample gives a bound, and what reaches it is kept."""

import pytest
import torch

from kernel_index.core.triton import launch
from kernel_index.routing.topk_keys import NOTHING, pack, rank_of

hopper = pytest.mark.skipif(
    launch.interpreting() or not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of sm_90",
)


def whole_numbers(length, heads, queries=None, batch=1, most=4, dtype=torch.bfloat16, seed=0):
    """Integers whose scores are exact in float32, in any order of their sums; some of them are equal."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, low=-most):
        return torch.randint(low, most + 1, shape, generator=generator).float()

    queries = queries or length
    q, k, w = draw(batch, queries, heads, 64), draw(batch, length, 64), draw(batch, queries, heads, low=1)
    return q.to(dtype), k.to(dtype), w * 1.5


def causal(queries, keys):
    end = torch.arange(keys - queries, keys, dtype=torch.int32)[None] + 1
    return torch.zeros_like(end), end


def documents(length, *cuts):
    start, end = causal(length, length)
    for cut in cuts:
        start[0, cut:] = cut
    return start, end


def by_a_sort(q, k, w, start, end, topk, rows):
    """Tokens and scores of some queries of one batch row, best first, of equal ones the first; −1 and −∞ at last."""
    z = torch.einsum("tjd,sd->tjs", q[rows].float(), k.float()).relu()
    scores = (z * w[rows].float()[..., None]).sum(1)
    at = torch.arange(k.shape[0], device=q.device)
    seen = (at >= start[rows, None]) & (at < end[rows, None])
    keys = torch.where(seen, pack(rank_of(scores), at), NOTHING).sort(-1, descending=True).values[:, :topk]
    token = torch.where(keys > NOTHING, 2**31 - 1 - (keys & (2**31 - 1)), -1)
    found = scores.gather(1, token.clamp(min=0)).masked_fill(token < 0, -torch.inf)
    return token, found


def best(q, k, w, start, end, topk):
    from kernel_index.routing.lightning_indexer import triton_best

    indices = torch.full((*q.shape[:2], topk), -7, dtype=torch.int64, device=q.device)
    return triton_best.best(q, k, w, start, end, topk, (indices, torch.full(indices.shape, -7.0, device=q.device)))


def compare(call, bounds, topk, rows):
    indices, scores = best(*call, *bounds, topk)
    for b in range(len(indices)):
        q, k, w = (x[b] for x in call)
        start, end = (x[b % len(x)] for x in bounds)
        expected, values = by_a_sort(q, k, w, start, end, topk, rows)
        assert torch.equal(indices[b, rows], expected)
        assert torch.equal(scores[b, rows].nan_to_num(nan=7e8), values.nan_to_num(nan=7e8))


CALLS = {
    "causal": (whole_numbers(9000, 4), causal(9000, 9000), 2048),
    "three heads, float16": (whole_numbers(9001, 3, dtype=torch.float16), causal(9001, 9001), 100),
    "documents, two rows": (whole_numbers(9033, 4, batch=2), documents(9033, 31, 4000, 4001, 8990), 512),
    "many keys": (whole_numbers(40_000, 4, queries=2200), causal(2200, 40_000), 4096),
    "few queries": (whole_numbers(40_000, 4, queries=70), causal(70, 40_000), 2048),
    "most are equal": (whole_numbers(6000, 4, most=1), causal(6000, 6000), 2048),
}


@hopper
@pytest.mark.parametrize("name", CALLS)
def test_tokens_and_scores_are_those_of_a_sort(name):
    call, bounds, topk = CALLS[name]
    queries = call[0].shape[1]
    rows = torch.cat([torch.arange(0, queries, 37), torch.arange(queries - 40, queries)]).clamp(min=0)
    compare([x.cuda() for x in call], [x.cuda() for x in bounds], topk, rows.cuda())


@hopper
@pytest.mark.parametrize("heads", [1, 2, 3, 4])
def test_what_is_not_finite_comes_first(heads):
    q, k, w = whole_numbers(9000, heads)
    k[0, 5::97], k[0, 7::1001, 3], q[0, 11::13, heads - 1] = torch.nan, torch.inf, torch.nan
    compare(
        [x.cuda() for x in (q, k, w)], [x.cuda() for x in causal(9000, 9000)], 600, torch.arange(0, 9000, 29).cuda()
    )


@hopper
def test_one_part_of_the_row_has_the_best_keys():
    """Its list is as long as all four together may be; the sample is of all parts."""
    q, k, w = whole_numbers(16_384, 4, most=3)
    q, k[:, 14_000:15_500] = q.abs(), k[:, 14_000:15_500].abs()
    compare(
        [x.cuda() for x in (q, k, w)],
        [x.cuda() for x in causal(16_384, 16_384)],
        1024,
        torch.arange(0, 16_384, 61).cuda(),
    )


@hopper
def test_the_same_bits_twice():
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, w = (torch.randn(1, 20_000, *n, device="cuda", generator=generator) for n in ((4, 64), (64,), (4,)))
    call = q.bfloat16(), k.bfloat16(), w, *(x.cuda() for x in causal(20_000, 20_000)), 2048
    first, second = best(*call), best(*call)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1].view(torch.int32), second[1].view(torch.int32))


def score_by_torch(call, bounds, first, topk, least, target, counts):
    """In place of the kernel for Hopper, which has no interpreter; what has no place is 0."""
    from kernel_index.routing.lightning_indexer import triton_scored

    q, k, w = call
    order = triton_scored.turned(torch.arange(len(k))[:, None])[:, 0]
    keys = torch.empty_like(k)
    keys[order] = k
    many = target.shape[-1] - (0 if counts is None else triton_scored.SLACK.value)
    for t in range(len(target)):
        start, end = (int(x[first + t]) for x in bounds)
        score = ((q[first + t].float() @ keys.float().T).relu() * w[first + t][:, None]).sum(0)
        if counts is None:
            at = torch.arange(many) * -(-len(keys) // many)
            seen = (at >= start) & (at < end)
            target[t] = torch.where(seen, rank_of(score)[at.clamp(max=len(keys) - 1)], -(2**31)).int()
            continue
        target[t] = 0
        size = -(-(end - start) // 4)
        for part in range(4 if least[t] > -(2**31) else 0):
            own = torch.arange(start + part * size, max(start + part * size, min(end, start + part * size + size)))
            own = own[rank_of(score[own]) >= least[t]]
            entry = (score[own].view(torch.int32).long() << 32) | own
            counts[t, part], target[t, part, : min(many, len(own))] = len(own), entry[:many]


@pytest.mark.skipif(not launch.interpreting(), reason="runs in Triton's interpreter, on a CPU")
@pytest.mark.parametrize("some", ["random", "equal", "a sample misleads"])
def test_rows_that_a_sample_finds_and_rows_that_it_does_not(some, monkeypatch):
    """Without the kernel that scores: its sample, its lists, and the rows that are left to the other way."""
    from kernel_index.routing.lightning_indexer import triton_best, triton_sample, triton_scored
    from kernel_index.routing.lightning_indexer import triton_rounds as triton

    for name, value in {"FEWEST": 16, "MOST": 16}.items():
        monkeypatch.setattr(triton, name, value)
    for name, value in {"SCORES_BYTES": 1 << 16, "PICKED_BYTES": 48 * 80}.items():
        monkeypatch.setattr(triton_best, name, value)
    monkeypatch.setattr(triton_scored, "takes", lambda q, k, topk, many: bool(many))
    monkeypatch.setattr(triton_scored, "queries_at_once", lambda q: 128)
    monkeypatch.setattr(triton_scored, "score", score_by_torch)
    found, pick = [], triton_sample.pick
    monkeypatch.setattr(triton_sample, "pick", lambda *call: (pick(*call), found.append(int(call[-1].sum()))))
    q, k, w = whole_numbers(250, 3, queries=150, most=1 if some == "equal" else 7, dtype=torch.float32)
    if some == "a sample misleads":
        k[0, 0::16] = q[0, 0, 0]  # every key of the sample
    start, end = causal(150, 250)
    start[0, 100:], end[0, 20:30] = 70, 3
    compare((q, k, w), (start, end), 6, torch.arange(150))
    assert 0 < sum(found) < 150
    assert len(found) == 2

"""What a captured CUDA graph reads stays where it is: lengths and page tables are written anew by every ``begin``."""

import pytest
import torch

import kernel_index as ki
from kernel_index.kvcache.step_tensors import StepTensors

H, K, D, PAGE, ROWS = 4, 2, 64, 4, 3


def new_cache(kind, device):
    """The cache, and how a step of some tokens begins."""
    if kind == "contiguous":
        cache = ki.ContiguousKVCache(1, ROWS, 128, K, D, device=device)
        return cache, cache.begin
    cache = ki.PagedKVCache(1, 128, PAGE, K, D, device=device)
    rows = [cache.allocate() for _ in range(ROWS)]
    return cache, lambda tokens: cache.begin(rows, tokens)


def prompt(cache, begin, draw):
    begin(6)
    cache.append(0, draw(ROWS, 6, K, D), draw(ROWS, 6, K, D))
    cache.advance([6, 2, 5])


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_later_steps_are_written_to_the_same_memory(kind):
    cache, begin = new_cache(kind, "cpu")
    prompt(cache, begin, torch.randn)
    begin(1)
    first = cache.layer(0)
    cache.advance()
    for step in range(1, 60):
        begin(1)
        layer = cache.layer(0)
        assert first["cache_seqlens"].tolist() == [6 + step, 2 + step, 5 + step]
        assert layer["cache_seqlens"].data_ptr() == first["cache_seqlens"].data_ptr()
        if kind == "paged":
            table, old = layer["block_table"], first["block_table"]
            assert (table.data_ptr(), table.stride()) == (old.data_ptr(), old.stride())
            pages = [list(cache.pages(row)) for row in range(ROWS)]
            assert [[i for i in row if i >= 0] for row in table.tolist()] == pages
        cache.advance()


def test_a_row_that_becomes_another_sequence_is_sent_whole():
    tensors = StepTensors(2, 8, torch.device("cpu"))
    tensors.send_table([[1, 2, 3, 4], [5]])
    assert tensors.send_table([[7, 2], [5, 6, 0]]).tolist() == [[7, 2, -1], [5, 6, 0]]
    assert tensors.send_table([[7, 2, 3, 1]]).tolist() == [[7, 2, 3, 1]]
    assert tensors.send_table([[], [5, 6]]).tolist() == [[-1, -1], [5, 6]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("function", ["dense", "moba"])
def test_one_captured_step_serves_a_hundred_later_ones(kind, function):
    """The same bits as eager calls, and the same cache."""
    (expected, cached), (actual, replayed) = (grown(kind, function, 100, replay) for replay in (False, True))
    for step, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, b), step
    assert torch.equal(cached, replayed)


def grown(kind, function, steps, replay):
    """The outputs of ``steps`` steps after a prompt; by one captured call, if ``replay``."""
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g).cuda()  # noqa: E731
    cache, begin = new_cache(kind, "cuda")
    prompt(cache, begin, draw)
    q, k, v = (torch.empty(ROWS, 1, heads, D, device="cuda") for heads in (H, K, K))

    def call(layer):
        if function == "dense":
            return ki.fa4_kvcache_decode(q, k=k, v=v, backend="triton", **layer)
        return ki.moba_decode(q, layer, k=k, v=v, block_size=3, topk=3, backend="triton")

    outs, graph, out = [], None, None
    for _ in range(steps):
        begin(1)
        for x in (q, k, v):
            x.copy_(draw(*x.shape))
        if not replay:
            outs.append(call(cache.layer(0)))
        else:
            if graph is None:
                layer, graph = cache.peek(0), torch.cuda.CUDAGraph()
                call(layer)  # compiles; the capture writes the same tokens again
                with torch.cuda.graph(graph):
                    out = call(layer)
            graph.replay()
            outs.append(out.clone())
            cache.layer(0)
        cache.advance()
    return outs, cache.k

"""Block means kept by the caches equal means taken from scratch, through whatever happens to a cache."""

import pytest
import torch

import kernel_index as ki

K, D, PAGE = 2, 4, 4


def put(cache, count, rows=None, *, keep=None, advance=True, seed=0):
    """One step of ``count`` random keys; the layer's view, to ask for means."""
    cache.begin(count) if rows is None else cache.begin(rows, count)
    layer = cache.layer(0)
    batch = len(layer.lengths_after)
    k = torch.randn(batch, count, K, D, generator=torch.Generator().manual_seed(seed))
    ki.fa4_kvcache_decode(k, k=k, v=k, **layer)
    means = {b: layer.block_means(b) for b in (2, 3, 4, 8)}
    check(cache, rows, layer.lengths_after, means)
    if advance:
        cache.advance(keep)


def check(cache, rows, lengths, means):
    for b, found in means.items():
        assert found.shape[1] == max(lengths) // b
        for i, n in enumerate(lengths):
            if rows is None:
                keys = cache.k[0, i]
            else:
                keys = cache.k[0][list(cache.pages(rows[i]))].flatten(0, 1)
            whole = n // b
            expected = keys[: whole * b].unflatten(0, (whole, b)).mean(1) if whole else keys[:0]
            torch.testing.assert_close(found[i, :whole], expected, rtol=1e-6, atol=1e-7)


def test_contiguous_through_padding_abandoned_steps_and_reset():
    cache = ki.ContiguousKVCache(1, 2, 32, K, D)
    put(cache, 11, keep=[11, 5], seed=1)
    put(cache, 3, seed=2)
    put(cache, 9, advance=False, seed=3)  # abandoned: other keys come to the same slots
    put(cache, 9, seed=4)
    cache.reset([0])
    put(cache, 5, seed=5)
    for _ in range(4):
        put(cache, 1, seed=6)


def test_paged_through_sharing_copies_and_reuse():
    cache = ki.PagedKVCache(1, 24, PAGE, K, D)
    first, other = cache.allocate(), cache.allocate()
    put(cache, 10, [first, other], keep=[10, 6], seed=1)
    second = cache.share(first)
    put(cache, 1, [second, first, other], seed=2)  # the page that two share is copied
    put(cache, 7, [first], advance=False, seed=3)
    put(cache, 7, [first, second], seed=4)
    cache.free(first)
    third = cache.allocate()  # takes pages that others have left
    put(cache, 13, [third, second], seed=5)


@pytest.mark.parametrize("change", ["reset", "abandoned", "padded"])
def test_keys_that_were_replaced_by_steps_that_asked_for_no_means(change):
    cache = ki.ContiguousKVCache(1, 2, 32, K, D)
    put(cache, 5, seed=1)
    put(cache, 16, seed=2, advance=change != "abandoned", keep=[3, 2] if change == "padded" else None)
    if change == "reset":
        cache.reset([1])
        cache.lengths[0] = 0
        cache.reset([0])
    cache.begin(10)
    cache.append(0, *(torch.randn(2, 10, K, D, generator=torch.Generator().manual_seed(3)) for _ in range(2)))
    cache.advance()
    put(cache, 1, seed=4)


def test_a_sequence_that_is_shared_within_a_step_knows_what_is_cached_alone():
    cache = ki.PagedKVCache(1, 24, PAGE, K, D)
    first = cache.allocate()
    put(cache, 5, [first], seed=1)
    cache.begin([first], 9)
    layer, k = cache.layer(0), torch.ones(1, 9, K, D)
    layer.write(k, k)
    layer.block_means(4)
    second = cache.share(first)
    cache.begin([second], 9)
    cache.append(0, 2 * k, k)
    cache.advance()
    put(cache, 1, [second], seed=2)


def test_each_block_is_averaged_once():
    cache = ki.ContiguousKVCache(1, 1, 64, K, D)
    for count in (20, *[1] * 20):
        put(cache, count)
    assert {b: means.computed for b, means in cache._means.items()} == {b: 40 // b for b in (2, 3, 4, 8)}


def test_a_view_of_a_closed_step_is_refused():
    cache = ki.ContiguousKVCache(1, 1, 8, K, D)
    cache.begin(1)
    layer = cache.layer(0)
    cache.advance()
    with pytest.raises(ValueError, match="a step that is over"):
        layer.block_means(2)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        layer.block_means(0)

"""The page allocator against a list of tokens: random walks, and each promise by itself."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import kernel_index as ki

LAYERS, PAGES, PAGE, HEADS, WIDTH = 2, 7, 3, 1, 2


def tokens(values: list[int], layer: int) -> torch.Tensor:
    """[1, n, K, D] that name the token and its layer."""
    return (torch.tensor(values, dtype=torch.float32) + 0.5 * layer).view(1, -1, 1, 1).expand(1, -1, HEADS, WIDTH)


class Walk(RuleBasedStateMachine):
    """Every operation beside its meaning on plain lists."""

    def __init__(self):
        super().__init__()
        self.cache = ki.PagedKVCache(LAYERS, PAGES, PAGE, HEADS, WIDTH)
        self.rows: dict[int, list[int]] = {}
        self.clock = 0
        self.steps = 0

    def any_row(self, data) -> int:
        return data.draw(st.sampled_from(sorted(self.rows)))

    @initialize(count=st.integers(1, 3))
    def start(self, count):
        for _ in range(count):
            self.allocate()

    @rule()
    def allocate(self):
        if len(self.rows) < 5:
            self.rows[self.cache.allocate()] = []

    @rule(data=st.data())
    def share(self, data):
        if self.rows and len(self.rows) < 5:
            source = self.any_row(data)
            self.rows[self.cache.share(source)] = list(self.rows[source])

    @rule(data=st.data())
    def free(self, data):
        if self.rows:
            chosen = self.any_row(data)
            self.cache.free(chosen)
            del self.rows[chosen]
            with pytest.raises(ValueError, match="sequence must be"):
                self.cache.length(chosen)

    @rule(data=st.data())
    def share_and_write_both(self, data):
        if self.rows and len(self.rows) < 5:
            source = self.any_row(data)
            copy = self.cache.share(source)
            self.rows[copy] = list(self.rows[source])
            self.write([source, copy], 1, [1, 1])

    @rule(data=st.data(), count=st.integers(0, 5), keep=st.booleans(), advance=st.integers(0, 4))
    def step(self, data, count, keep, advance):
        if not self.rows:
            return
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.rows)), unique=True, min_size=1))
        kept = [data.draw(st.integers(0, count)) if keep else count for _ in chosen]
        self.write(chosen, count, kept if advance else None)

    def write(self, chosen, count, kept):
        """One step; without ``kept`` it is abandoned, and what it wrote no longer counts."""
        before = {s: self.cache.pages(s) for s in self.rows}
        state = (self.cache.free_pages, self.cache.counters.__dict__.copy(), self.cache.k.clone())
        try:
            self.cache.begin(chosen, count)
        except ki.OutOfPages:
            assert {s: self.cache.pages(s) for s in self.rows} == before
            assert (self.cache.free_pages, self.cache.counters.__dict__) == state[:2]
            assert torch.equal(self.cache.k, state[2])
            return
        new = {s: [self.clock + 10 * i + j for j in range(count)] for i, s in enumerate(chosen)}
        self.clock += 100
        for layer in range(LAYERS):
            stacked = torch.cat([tokens(new[s], layer) for s in chosen])
            self.cache.append(layer, stacked, -stacked)
        if kept is None:
            return
        self.cache.advance(kept)
        self.steps += 1
        for s, n in zip(chosen, kept, strict=True):
            self.rows[s] += new[s][:n]

    @invariant()
    def every_sequence_holds_its_tokens(self):
        for s, values in self.rows.items():
            assert self.cache.length(s) == len(values)
            for layer in range(LAYERS):
                k, v = self.cache.gathered(s, layer)
                expected = tokens(values, layer)[0]
                assert torch.equal(k, expected)
                assert torch.equal(v, -expected)

    @invariant()
    def every_page_is_counted(self):
        held = [page for s in self.rows for page in self.cache.pages(s)]
        for page in range(PAGES):
            assert self.cache.owners(page) == held.count(page)
        assert self.cache.free_pages == PAGES - len(set(held))
        counters = self.cache.counters
        assert counters.allocated - counters.freed == len(set(held))
        assert counters.advances == self.steps


Walk.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None, derandomize=True)
TestWalk = Walk.TestCase


def filled(count: int, pages: int = PAGES) -> tuple[ki.PagedKVCache, int]:
    cache = ki.PagedKVCache(LAYERS, pages, PAGE, HEADS, WIDTH)
    row = cache.allocate()
    write(cache, [row], count)
    return cache, row


def write(cache: ki.PagedKVCache, rows: list[int], count: int, value: float = 1.0) -> None:
    cache.begin(rows, count)
    x = torch.full((len(rows), count, HEADS, WIDTH), value)
    for layer in range(cache.layers):
        cache.append(layer, x, x)
    cache.advance()


def test_lengths_advance_once_and_only_after_every_layer():
    cache, row = filled(2)
    cache.begin([row], 1)
    x = torch.zeros(1, 1, HEADS, WIDTH)
    cache.append(0, x, x)
    with pytest.raises(ValueError, match=r"after every layer of the step, got none for \[1\]"):
        cache.advance()
    assert cache.length(row) == 2
    with pytest.raises(ValueError, match="not yet served in this step, got 0"):
        cache.layer(0)
    cache.append(1, x, x)
    cache.advance()
    assert cache.length(row) == 3
    with pytest.raises(ValueError, match="begin must be called"):
        cache.advance()


def test_counters_count_layers_steps_and_pages():
    cache, row = filled(4)
    c = cache.counters
    assert (c.reads, c.writes, c.advances, c.allocated, c.freed, c.copied, c.zeroed) == (0, 2, 1, 2, 0, 0, 0)
    cache.begin([row], 0)
    for layer in range(LAYERS):
        cache.layer(layer)
    cache.advance()
    assert (c.reads, c.writes, c.advances) == (2, 2, 2)
    cache.free(row)
    assert (c.freed, cache.free_pages) == (2, PAGES)


def test_out_of_pages_loses_nothing_and_freeing_makes_room():
    cache, row = filled(5, pages=3)
    other = cache.allocate()
    write(cache, [other], 3)
    with pytest.raises(ki.OutOfPages, match="at most 0 free pages, got 2"):
        cache.begin([row, other], 3)
    assert (cache.length(row), cache.length(other), cache.pages(row)) == (5, 3, (0, 1))
    write(cache, [row], 1)  # room in its own last page
    cache.free(other)
    write(cache, [row], 3)
    assert cache.length(row) == 9


def test_a_page_that_returns_is_zeroed_before_it_is_read_again():
    cache, row = filled(3)
    write(cache, [row], 3, value=float("nan"))
    kept = cache.share(row)
    cache.free(row)
    cache.free(kept)
    new = cache.allocate()
    write(cache, [new], 4)  # the same pages; the second has one token and two slots that were not written
    assert set(cache.pages(new)) == {0, 1}
    assert torch.isfinite(cache.k).all()
    assert cache.counters.zeroed == 2


def test_a_copy_takes_only_what_is_cached():
    cache, row = filled(1)
    cache.k[:, cache.pages(row)[0], 1:] = float("nan")
    copy = cache.share(row)
    write(cache, [copy], 1)
    page = cache.pages(copy)[0]
    assert page != cache.pages(row)[0]
    assert torch.isfinite(cache.k[:, page]).all()


def test_two_writers_of_one_page_get_one_copy():
    cache, row = filled(4)
    other = cache.share(row)
    assert cache.owners(cache.pages(row)[1]) == 2
    write(cache, [row, other], 1)
    assert cache.counters.copied == 1
    assert cache.pages(row)[0] == cache.pages(other)[0]
    assert cache.pages(row)[1] != cache.pages(other)[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.begin([0, 0], 1), "sequences must be different"),
        (lambda c: c.begin([5], 1), "sequence must be one that was allocated"),
        (lambda c: c.begin([0], -1), "tokens must be at least 0"),
        (lambda c: c.free(9), "sequence must be one that was allocated"),
        (lambda c: c.share(9), "sequence must be one that was allocated"),
        (lambda c: c.layer(0), "begin must be called"),
        (lambda c: ki.PagedKVCache(1, 0, 4, 1, 2), "pages must be at least 1"),
    ],
)
def test_mistakes_are_named(call, message):
    cache, _ = filled(2)
    with pytest.raises(ValueError, match=message):
        call(cache)


def test_contiguous_cache_refuses_what_does_not_fit():
    cache = ki.ContiguousKVCache(1, 2, 4, HEADS, WIDTH)
    x = torch.ones(2, 3, HEADS, WIDTH)
    cache.begin(3)
    cache.append(0, x, x)
    cache.advance([3, 1])
    assert cache.lengths == [3, 1]
    with pytest.raises(ValueError, match="tokens must be at most 1, the room left, got 2"):
        cache.begin(2)
    with pytest.raises(ValueError, match="tokens must be 2 numbers from 0 to 1"):
        cache.begin(1), cache.append(0, x[:, :1], x[:, :1]), cache.advance([2, 0])
    cache.reset([0])
    assert cache.lengths == [0, 1]
    assert not cache.k[:, 0].any()
    assert cache.k[0, 1, 0].all()


@pytest.mark.parametrize("make", [ki.PagedKVCache, ki.ContiguousKVCache])
def test_a_cache_made_in_inference_mode_is_written_outside(make):
    x = torch.ones(1, 2, HEADS, WIDTH, requires_grad=True)
    with torch.inference_mode():
        cache = make(LAYERS, 1, PAGE, HEADS, WIDTH)
        cache.begin(*([cache.allocate()],) if make is ki.PagedKVCache else (), 2)
    for layer in range(LAYERS):
        ki.fa4_kvcache_decode(x, k=x, v=x, **cache.layer(layer)).sum().backward()
    cache.advance()
    assert x.grad.any()

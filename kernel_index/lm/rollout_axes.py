"""The axes of ``rollout_check``: ways to compute the log-probabilities of the same sequences.

The base of every comparison is the training forward over rows of packed sequences.  Each axis computes the same
log-probabilities in another way and compares them bit by bit.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.lm.cache import ModelCache
from kernel_index.lm.config import ModelConfig
from kernel_index.lm.data import IGNORED, START, Batch
from kernel_index.lm.model import LanguageModel
from kernel_index.lm.trees import TokenTree, TreeBatch

AT_ONCE = 32
"""Sequences that are decoded together."""


@dataclass
class Finding:
    """What one axis found: the largest difference, and how many of the compared values have other bits.

    ``refused`` is the rule by which a function has no invariant form for it; nothing was compared then.
    """

    largest: float = 0.0
    differing: int = 0
    compared: int = 0
    refused: str = ""

    @property
    def is_exact(self) -> bool:
        return not self.refused and self.compared > 0 and self.differing == 0

    def compare(self, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        for one, other in zip(found, expected, strict=True):
            one, other = (x.detach().float().cpu() for x in (one, other))  # what is decoded is collected there
            same = one.view(torch.int32) == other.view(torch.int32)
            self.differing += int((~same).sum())
            self.compared += one.numel()
            if one.numel():
                self.largest = max(self.largest, float((one - other).abs().nan_to_num(torch.inf).max()))


class Subject(NamedTuple):
    """A model, sequences of tokens [n], and the log-probabilities [n − 1] of the training forward."""

    model: LanguageModel
    sequences: list[Tensor]
    expected: list[Tensor]
    generator: torch.Generator
    compiler: str

    def draw(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def order(self) -> list[int]:
        return torch.randperm(len(self.sequences), generator=self.generator).tolist()

    def gradients(self, rows: Sequence[Sequence[int]], finding: "Finding", length: int | None = None) -> list[Tensor]:
        """Those of all weights, for a sum of log-probabilities, which are compared; each target has a weight."""

        @torch.enable_grad()
        def call(batch: Batch) -> Tensor:
            log_probs = self.model.log_probs(batch)
            (log_probs * (1 + batch.targets % 7)).sum().backward()
            return log_probs

        self.model.zero_grad()
        finding.compare(trained(self.model, rows, self.sequences, length=length, call=call), self.expected)
        found = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.model.zero_grad()
        return found


Axis = Callable[[Subject, Finding], None]
AXES: dict[str, Axis] = {}


def axis(name: str) -> Callable[[Axis], Axis]:
    def register(function: Axis) -> Axis:
        AXES[name] = function
        return function

    return register


def drawn(config: ModelConfig, tokens: int, generator: torch.Generator) -> list[Tensor]:
    """Two random sequences or more of 2 to ``context`` tokens, each after START."""
    sequences: list[Tensor] = []
    while sum(map(len, sequences)) < tokens or len(sequences) < 2:
        size = int(torch.randint(2, min(config.context, max(3, tokens)) + 1, (), generator=generator))
        tail = torch.randint(0, START, (size - 1,), generator=generator)
        sequences.append(torch.cat((torch.tensor([START]), tail)))
    return sequences


def packed(sequences: Sequence[Tensor], length: int, order: Sequence[int] | None = None) -> list[list[int]]:
    """Rows of the sequences' numbers, each row filled up to ``length`` tokens in turn."""
    rows: list[list[int]] = []
    room = 0
    for i in range(len(sequences)) if order is None else order:
        if len(sequences[i]) > room:
            rows, room = [*rows, []], length
        rows[-1].append(i)
        room -= len(sequences[i])
    return rows


def trained(
    model: LanguageModel, rows: Sequence[Sequence[int]], sequences: Sequence[Tensor], *, length: int | None = None,
    call: Callable[[Batch], Tensor] | None = None,
) -> list[Tensor]:  # fmt: skip
    """The log-probabilities of each sequence by the training forward, the sequences packed as the rows say."""
    device = model.head.weight.device
    batch = Batch.of_documents([[sequences[i] for i in row] for row in rows], length)
    with torch.no_grad():  # where gradients are made, a batch is put into one order, and this packing would be gone
        log_probs = (call or model.log_probs)(Batch(*(t.to(device) for t in batch))).detach()
    found: dict[int, Tensor] = {}
    for row, numbers in enumerate(rows):
        first = 0
        for i in numbers:
            found[i] = log_probs[row, first : first + len(sequences[i]) - 1]
            first += len(sequences[i])
    return [found[i] for i in sorted(found)]


# The training forward


@axis("batch size")
def _batch_size(s: Subject, finding: Finding) -> None:
    numbers = range(len(s.sequences))
    finding.compare(trained(s.model, [[i] for i in numbers], s.sequences), s.expected)
    for i in numbers:
        finding.compare(trained(s.model, [[0]], [s.sequences[i]]), [s.expected[i]])


@axis("order of rows")
def _order_of_rows(s: Subject, finding: Finding) -> None:
    rows = packed(s.sequences, s.model.config.context)
    order = torch.randperm(len(rows), generator=s.generator).tolist()
    finding.compare(trained(s.model, [rows[i] for i in order], s.sequences), s.expected)
    finding.compare(trained(s.model, rows[::-1], s.sequences), s.expected)


@axis("packed or alone")
def _packing(s: Subject, finding: Finding) -> None:
    context = s.model.config.context
    for _ in range(2):
        rows = packed(s.sequences, context, s.order())
        finding.compare(trained(s.model, rows, s.sequences, length=context + s.draw(0, 40)), s.expected)
    alone = [[i] for i in range(len(s.sequences))]
    finding.compare(trained(s.model, alone, s.sequences, length=context), s.expected)


@axis("thread count")
def _threads(s: Subject, finding: Finding) -> None:
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            finding.compare(trained(s.model, packed(s.sequences, s.model.config.context), s.sequences), s.expected)
    finally:
        torch.set_num_threads(before)


@axis("gradients")
def _gradients(s: Subject, finding: Finding) -> None:
    """The gradients of all weights, from other orders and packings; and the log-probabilities they come with."""
    context, numbers = s.model.config.context, range(len(s.sequences))
    expected = s.gradients(packed(s.sequences, context), finding)
    packings = [
        (packed(s.sequences, context)[::-1], None),
        (packed(s.sequences, context, s.order()), context + s.draw(0, 40)),
        ([[i] for i in s.order()], None),
        ([list(numbers)], None),
    ]
    for rows, length in packings:
        finding.compare(s.gradients(rows, finding, length), expected)


@axis("activation checkpointing")
def _checkpointing(s: Subject, finding: Finding) -> None:
    """The log-probabilities, and the gradients of all weights."""
    gradients = []
    for recompute in (False, True):
        with _recomputing(s.model, recompute):
            gradients.append(s.gradients(packed(s.sequences, s.model.config.context), finding))
    finding.compare(*gradients)


@contextlib.contextmanager
def _recomputing(model: LanguageModel, recompute: bool) -> Iterator[None]:
    before = [block.recompute for block in model.hybrid_blocks()]
    try:
        for block in model.hybrid_blocks():
            block.recompute = recompute
        yield
    finally:
        for block, value in zip(model.hybrid_blocks(), before, strict=True):
            block.recompute = value


@axis("compile on or off")
def _compiled(s: Subject, finding: Finding) -> None:
    call: Any = torch.enable_grad()(torch.compile(s.model.log_probs, backend=s.compiler))
    rows = packed(s.sequences, s.model.config.context)
    finding.compare(trained(s.model, rows, s.sequences, length=s.model.config.context, call=call), s.expected)


@axis("prefix tree")
def _tree(s: Subject, finding: Finding) -> None:
    """A prompt with two continuations, in a row of its own; its paths alone are what it is compared with."""
    for first, second in itertools.pairwise(s.sequences):
        prompt, rest, other = first[: len(first) // 2 + 1], first[len(first) // 2 + 1 :], second[1:]
        branches = [run for run in (rest, other[: s.model.config.context - len(prompt)]) if len(run)]
        for align in (1, 128):
            tree = TokenTree([-1, *[0] * len(branches)], [prompt, *branches])
            batch = TreeBatch.of([tree], align=align)
            batch = batch.to(s.model.head.weight.device)
            paths = [torch.cat((prompt, run)) for run in branches]
            alone = trained(s.model, [[i] for i in range(len(paths))], paths)
            with torch.no_grad():
                finding.compare([s.model.log_probs(batch)], [_of_edges(tree, batch, alone)])


def _of_edges(tree: TokenTree, batch: TreeBatch, alone: list[Tensor]) -> Tensor:
    """The log-probabilities of a tree's edges, from those of its paths: edges come in the order of their targets."""
    prompt = len(tree.runs[0])
    runs = [alone[0][: prompt - 1], *(path[prompt - 1 :] for path in alone)]
    found = torch.cat(runs)
    assert len(found) == len(batch.targets)
    return found


# Decoding


def decoded(
    model: LanguageModel,
    sequences: Sequence[Tensor],
    *,
    page: int = 16,
    chunk: Callable[[], int] = lambda: 1,
    between: Callable[[ModelCache, list[int], list[int]], list[int]] | None = None,
    scattered: bool = False,
    at_once: int = AT_ONCE,
) -> list[Tensor]:
    """The log-probabilities of each sequence by decoding it from a cache, several sequences together.

    Args:
        model: the model.
        sequences: tokens [n], which are read and not drawn.
        page: tokens of a page.
        chunk: the number of tokens that a sequence reads in its next step.
        between: called once when a sequence is half read, with the cache, its sequences and their lengths; returns the
            sequences to go on with, of which one may be empty again.
        scattered: whether the pages come in a mixed order, and hold what others have left there.
        at_once: sequences that are decoded together.
    """
    found: list[Tensor] = []
    for first in range(0, len(sequences), at_once):
        group = sequences[first : first + at_once]
        pages = sum(-(-len(s) // page) for s in group)
        cache = model.new_cache((3 * pages + 4 * at_once) * page, page)
        if scattered:
            _scatter(model, cache, pages, page)
        found += _Reading(model, cache, group, chunk).run(between)
    return found


def _scatter(model: LanguageModel, cache: ModelCache, pages: int, page: int) -> None:
    others = [cache.allocate() for _ in range(2 * pages)]
    for other in others:
        cache.begin([other], page)
        model.cached_hidden(torch.full((1, page), 7, device=model.head.weight.device), 0, cache)
        cache.advance()
    for i in torch.randperm(len(others), generator=torch.Generator().manual_seed(1)).tolist():
        cache.free(others[i])


class _Reading:
    """Sequences that are read from a cache, step by step; the last token of each is a target alone."""

    def __init__(self, model: LanguageModel, cache: ModelCache, group: Sequence[Tensor], chunk: Callable[[], int]):
        self.model, self.cache, self.group, self.chunk = model, cache, group, chunk
        self.ids = [cache.allocate() for _ in group]
        self.found = [torch.full((len(s) - 1,), torch.nan) for s in group]

    def run(self, between: Callable[[ModelCache, list[int], list[int]], list[int]] | None) -> list[Tensor]:
        halves = [(len(s) - 1) // 2 if between else len(s) - 1 for s in self.group]
        self._read_to(halves)
        if between:
            self.ids = between(self.cache, self.ids, halves)
            self._read_to([len(s) - 1 for s in self.group])
        return self.found

    def _read_to(self, ends: list[int]) -> None:
        while live := [i for i, end in enumerate(ends) if self.cache.length(self.ids[i]) < end]:
            starts = [self.cache.length(self.ids[i]) for i in live]
            counts = [min(self.chunk(), ends[i] - start) for i, start in zip(live, starts, strict=True)]
            self._step(live, starts, counts)

    def _step(self, live: list[int], starts: list[int], counts: list[int]) -> None:
        longest, device = max(counts), self.model.head.weight.device
        tokens, targets = (torch.full((len(live), longest), value) for value in (START, IGNORED))
        for row, (i, start, count) in enumerate(zip(live, starts, counts, strict=True)):
            tokens[row, :count] = self.group[i][start : start + count]
            targets[row, :count] = self.group[i][start + 1 : start + count + 1]
        tokens, targets = tokens.to(device), targets.to(device)
        self.cache.begin([self.ids[i] for i in live], longest, None if min(counts) == longest else counts)
        hidden = self.model.cached_hidden(tokens, torch.tensor(starts, device=device), self.cache)
        self.cache.advance()
        log_probs = self.model.log_probs_of(hidden, targets).detach().cpu()  # one copy for all rows
        for row, (i, start, count) in enumerate(zip(live, starts, counts, strict=True)):
            self.found[i][start : start + count] = log_probs[row, :count]


@axis("cached decoding")
def _token_by_token(s: Subject, finding: Finding) -> None:
    finding.compare(decoded(s.model, s.sequences), s.expected)


@axis("chunked prefill")
def _chunked(s: Subject, finding: Finding) -> None:
    finding.compare(decoded(s.model, s.sequences, chunk=lambda: s.draw(1, 150)), s.expected)
    finding.compare(decoded(s.model, s.sequences, chunk=lambda: s.model.config.context), s.expected)


@axis("page size")
def _page_size(s: Subject, finding: Finding) -> None:
    for page in (1, 5, 64):
        finding.compare(decoded(s.model, s.sequences, page=page, chunk=lambda: s.draw(1, 90)), s.expected)


@axis("page order")
def _page_order(s: Subject, finding: Finding) -> None:
    finding.compare(decoded(s.model, s.sequences, chunk=lambda: s.draw(1, 90), scattered=True), s.expected)


@axis("prefix reuse")
def _prefix_reuse(s: Subject, finding: Finding) -> None:
    """Each sequence goes on as a second one that shares its pages, after the first has written over a shared page."""

    def between(cache: ModelCache, ids: list[int], lengths: list[int]) -> list[int]:
        shared = [cache.share(i) for i in ids]
        cache.begin(ids, 1)
        tokens = torch.full((len(ids), 1), 9, device=s.model.head.weight.device)
        s.model.cached_hidden(tokens, torch.tensor(lengths, device=tokens.device), cache)
        cache.advance()
        return shared

    finding.compare(decoded(s.model, s.sequences, chunk=lambda: s.draw(1, 90), between=between), s.expected)


@axis("recomputation after eviction")
def _eviction(s: Subject, finding: Finding) -> None:
    """Half read, every other sequence is freed and read again from its start."""

    def between(cache: ModelCache, ids: list[int], lengths: list[int]) -> list[int]:
        for i in ids[::2]:
            cache.free(i)
        return [cache.allocate() if n % 2 == 0 else i for n, i in enumerate(ids)]

    finding.compare(decoded(s.model, s.sequences, chunk=lambda: s.draw(1, 90), between=between), s.expected)

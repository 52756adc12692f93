"""The caches of a model that generates: pages for every kind of attention, states for the Mamba mixers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.core import checks
from kernel_index.nn import MLA, Attention, ExactTokenCache, Mamba2, MixerState, PagedLatentCache, SparseAttention


@dataclass
class _Step:
    """An open step: sequences, tokens of each, the real ones among them, states, and blocks that took their cache."""

    sequences: list[int]
    tokens: int
    counts: list[int]
    states: list[MixerState]
    taken: set[int] = field(default_factory=set)


class ModelCache:
    """One set of sequences over the caches of all blocks: ``pools`` holds pages by kind, and each sequence has states.

    A step is ``begin``, then ``layer`` for each block, then ``advance``; ``begin`` discards a step that was not
    advanced.  ``mixing`` holds the mixing matrices of the hyper-connections at the latest prompt.

    Args:
        mixers: the mixer of every block, None for blocks without one.
        tokens: capacity of all sequences together.  Blocks that keep states only (``M``) have no limit.
        page_size: tokens of a page.
    """

    def __init__(self, mixers: Sequence[nn.Module | None], tokens: int, page_size: int = 16):
        checks.is_int("tokens", tokens, minimum=1)
        checks.is_int("page_size", page_size, minimum=1)
        self.mixers, pages = list(mixers), -(-tokens // page_size)
        self.mixing: Tensor | None = None
        self._layers_by_kind = _layers_by_kind(self.mixers)
        self.pools: dict[str, ki.PagedKVCache] = {}
        for name in dict.fromkeys(kind for layers in self._layers_by_kind for kind, _ in layers if kind != "state"):
            users = [m for m in mixers if name in _kinds_of(m)]
            self.pools[name] = _new_pool(name, users[0], (len(users), pages, page_size))
        self._next = 0
        self._lengths: dict[int, int] = {}
        self._states: dict[int, list[MixerState]] = {}
        self._step: _Step | None = None
        self._latest: list[int] = []

    def allocate(self) -> int:
        """A new, empty sequence."""
        for pool in self.pools.values():
            pool.allocate()
        with torch.inference_mode(False):  # states must stay usable outside inference mode, as pages are
            states = [m.new_state(1) for m in self.mixers if isinstance(m, Mamba2)]
        return self._add(0, states)

    def share(self, sequence: int) -> int:
        """A new sequence with the same tokens: pages are shared until one of the two writes, states are copied."""
        length = self.length(sequence)
        for pool in self.pools.values():
            pool.share(sequence)
        with torch.inference_mode(False):
            states = [_row(state, 0) for state in self._states[sequence]]
        return self._add(length, states)

    def free(self, sequence: int) -> None:
        """Free a sequence, and discard an open step that it is part of."""
        self.length(sequence)
        for pool in self.pools.values():
            pool.free(sequence)
        del self._lengths[sequence], self._states[sequence]
        self._latest = [s for s in self._latest if s != sequence]
        if self._step is not None and sequence in self._step.sequences:
            self._step = None

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        if sequence not in self._lengths:
            raise ValueError(f"sequence must be one that was allocated and not freed, got {sequence!r}")
        return self._lengths[sequence]

    def begin(self, sequences: Sequence[int], tokens: int, counts: Sequence[int] | None = None) -> None:
        """Open a step of ``tokens`` tokens in each sequence, of which only the first ``counts`` are real.

        Raises:
            ValueError: a sequence is unknown or named twice, a count is not from 0 to ``tokens``, or pages are missing
                (``OutOfPages`` where the model has pages).  Nothing was changed.
        """
        chosen = list(sequences)
        self._check_step(chosen, tokens, counts)
        for pool in self.pools.values():  # all pools have the same pages: the first one raises before any has changed
            pool.begin(chosen, tokens)
        kept = [tokens] * len(chosen) if counts is None else list(counts)
        states = [] if not self._states[chosen[0]] else self._joined(chosen, None if counts is None else kept)
        self._step, self._latest = _Step(chosen, tokens, kept, states), chosen

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise ``ValueError`` unless the tokens have the shape of the step, for which slots are reserved already."""
        step = self._open()
        checks.has_shape("tokens", tokens, (len(step.sequences), step.tokens), "[B, T] of the step")

    def layer(self, block: int) -> Any:
        """The cache that the mixer of a block takes in this step; once for each block."""
        step = self._open()
        if block in step.taken:
            raise ValueError(f"block must be one that has not taken its cache in this step, got {block}")
        step.taken.add(block)
        layers = self._layers_by_kind[block]
        caches: list[Any] = [step.states[n] if kind == "state" else self.pools[kind].layer(n) for kind, n in layers]
        if len(caches) > 1:
            return ExactTokenCache(*caches)
        return caches[0] if caches else None

    def advance(self) -> None:
        """Close the step: its real tokens are part of the sequences from now on."""
        step = self._open()
        missing = [i for i, layers in enumerate(self._layers_by_kind) if layers and i not in step.taken]
        if missing:
            raise ValueError(f"advance must be called after every block of the step, got none for {missing}")
        for pool in self.pools.values():
            pool.advance(step.counts)
        for sequence, count in zip(step.sequences, step.counts, strict=True):
            self._lengths[sequence] += count
        if step.states:
            with torch.inference_mode(False):
                for row, sequence in enumerate(step.sequences):
                    self._states[sequence] = [_row(state, row) for state in step.states]
        self._step = None

    def lengths(self) -> list[int]:
        """Tokens of the sequences of the latest step, which counts once it has advanced."""
        return [self._lengths[s] for s in self._latest]

    def _check_step(self, chosen: list[int], tokens: int, counts: Sequence[int] | None) -> None:
        checks.is_int("tokens", tokens, minimum=1)
        if not chosen:
            raise ValueError("sequences must be at least one, got none")
        unknown = [s for s in chosen if s not in self._lengths]
        if unknown:
            raise ValueError(f"sequences must be allocated and not freed, got {unknown[0]!r}")
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"sequences must be different from each other, got {chosen}")
        n, kept = len(chosen), [] if counts is None else list(counts)
        if counts is not None and not (len(kept) == n and all(isinstance(c, int) and 0 <= c <= tokens for c in kept)):
            raise ValueError(f"counts must be {n} numbers from 0 to {tokens}, got {kept}")

    def _joined(self, chosen: list[int], counts: list[int] | None) -> list[MixerState]:
        """The states of these sequences, one for each layer, their rows in this order."""
        joined: list[MixerState] = []
        with torch.inference_mode(False):
            for rows in zip(*(self._states[s] for s in chosen), strict=True):
                conv, scan = torch.cat([r.conv for r in rows]), torch.cat([r.scan for r in rows])
                real = None if counts is None else torch.tensor(counts, device=conv.device)
                like = next((r.open for r in rows if r.open), ())
                opens = [r.open or tuple(map(torch.zeros_like, like)) for r in rows]  # a new sequence has none open
                left = tuple(map(torch.cat, zip(*opens, strict=True)))
                joined.append(MixerState(conv, scan, real, left, any(r.ordinary for r in rows)))
        return joined

    def _open(self) -> _Step:
        if self._step is None:
            raise ValueError("begin must be called before a step's layers, got no step under way")
        return self._step

    def _add(self, length: int, states: list[MixerState]) -> int:
        self._next += 1  # pools receive the same calls, so that they give a sequence the same number
        self._lengths[self._next - 1], self._states[self._next - 1] = length, states
        return self._next - 1


def _row(state: MixerState, row: int) -> MixerState:
    """A copy of one row, without a gradient."""
    conv, scan, *left = (t.detach()[row : row + 1].clone() for t in (state.conv, state.scan, *state.open))
    return MixerState(conv, scan, open=tuple(left), ordinary=state.ordinary)


def _layers_by_kind(mixers: Sequence[nn.Module | None]) -> list[list[tuple[str, int]]]:
    """For each block the kinds of its caches, and its layer number among the blocks of that kind."""
    seen: Counter[str] = Counter()
    layers: list[list[tuple[str, int]]] = []
    for mixer in mixers:
        layers.append([(kind, seen[kind]) for kind in _kinds_of(mixer)])
        seen.update(_kinds_of(mixer))
    return layers


def _kinds_of(mixer: nn.Module | None) -> tuple[str, ...]:
    """The names of the pools that hold a mixer's pages, or ``"state"``."""
    if isinstance(mixer, Mamba2):
        return ("state",)
    if isinstance(mixer, Attention):
        return ("attention",)
    if isinstance(mixer, SparseAttention):  # a pool of its own: block means are kept for all layers of a pool
        return ("sparse",) if mixer.index is None else ("tokens", "index")
    return ("latent",) if isinstance(mixer, MLA) else ()


def _new_pool(name: str, mixer: nn.Module | None, sizes: tuple[int, int, int]) -> ki.PagedKVCache:
    """A pool for mixers of this kind; ``sizes`` are layers, pages and tokens of a page."""
    if isinstance(mixer, MLA):
        return PagedLatentCache(*sizes, mixer.latent + mixer.rope_dim, **_like(mixer.norm))
    assert isinstance(mixer, Attention | SparseAttention)
    options = _like(mixer.k.weight)
    if name == "index" and isinstance(mixer, SparseAttention) and mixer.index is not None:
        return PagedLatentCache(*sizes, mixer.index.k.out_features, **options)
    return ki.PagedKVCache(*sizes, mixer.kv_heads, mixer.head_dim, **options)


def _like(weight: Tensor) -> dict[str, Any]:
    """Device and dtype of the keys."""
    return {"dtype": checks.product_dtype(weight), "device": weight.device}

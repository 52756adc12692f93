"""What a model remembers while it generates: pages for attention of every kind, states for the mixers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.nn import MLA, Attention, ExactTokenCache, Mamba2, MixerState, PagedLatentCache, SparseAttention


class ModelCache:
    """One set of sequences over the caches of all blocks: ``pools`` of pages by kind, and states.

    A step is ``begin``, then ``layer`` for each block, then ``advance``.  ``mixing`` is what the
    hyper-connections of the latest prompt mixed their streams by.

    Args:
        mixers: the mixer of every block, None for blocks without one.
        tokens: room in all sequences together.
        page_size: tokens of a page.
    """

    def __init__(self, mixers: Sequence[nn.Module | None], tokens: int, page_size: int = 16):
        self.mixers, pages = list(mixers), -(-tokens // page_size)
        self.mixing: Tensor | None = None
        self.pools: dict[str, ki.PagedKVCache] = {}
        for name in dict.fromkeys(pool for mixer in mixers for pool in _pools_of(mixer)):
            users = [m for m in mixers if name in _pools_of(m)]
            self.pools[name] = _new_pool(name, users[0], (len(users), pages, page_size))
        self._next = 0
        self._lengths: dict[int, int] = {}
        self._states: dict[int, list[MixerState]] = {}
        self._step: tuple[list[int], list[int]] = ([], [])
        self._stepping: list[MixerState] = []
        self._served = dict.fromkeys((*self.pools, "state"), 0)

    def allocate(self) -> int:
        """A new, empty sequence."""
        for pool in self.pools.values():
            pool.allocate()
        return self._add(0, [m.new_state(1) for m in self._state_mixers()])

    def share(self, sequence: int) -> int:
        """A new sequence with the same tokens: pages are shared until one of the two writes, states are copied."""
        for pool in self.pools.values():
            pool.share(sequence)
        states = [MixerState(s.conv.clone(), s.scan.clone()) for s in self._states[sequence]]
        return self._add(self._lengths[sequence], states)

    def free(self, sequence: int) -> None:
        """Forget a sequence."""
        for pool in self.pools.values():
            pool.free(sequence)
        del self._lengths[sequence], self._states[sequence]

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        return self._lengths[sequence]

    def begin(self, sequences: Sequence[int], tokens: int, counts: Sequence[int] | None = None) -> None:
        """Open a step of so many tokens in each sequence, of which only the first ``counts`` are real."""
        chosen = list(sequences)
        for pool in self.pools.values():
            pool.begin(chosen, tokens)
        kept = [tokens] * len(chosen) if counts is None else list(counts)
        self._step = chosen, kept
        self._served = dict.fromkeys(self._served, 0)
        self._stepping = []
        for layer in range(len(self._state_mixers())):
            rows = [self._states[s][layer] for s in chosen]
            real = None if counts is None else torch.tensor(kept, device=rows[0].conv.device)
            joined = MixerState(torch.cat([r.conv for r in rows]), torch.cat([r.scan for r in rows]), real)
            self._stepping.append(joined)

    def layer(self, block: int) -> Any:
        """What the mixer of a block takes as its cache in this step; blocks are asked for in order."""
        mixer = self.mixers[block]
        if mixer is None:
            return None
        if isinstance(mixer, Mamba2):
            return self._stepping[self._turn("state")]
        layers = [self.pools[pool].layer(self._turn(pool)) for pool in _pools_of(mixer)]
        return layers[0] if len(layers) == 1 else ExactTokenCache(*layers)

    def advance(self) -> None:
        """Count the real tokens of the step as seen."""
        chosen, kept = self._step
        for pool in self.pools.values():
            pool.advance(kept)
        for row, sequence in enumerate(chosen):
            self._lengths[sequence] += kept[row]
            at = slice(row, row + 1)
            self._states[sequence] = [MixerState(s.conv[at].clone(), s.scan[at].clone()) for s in self._stepping]

    def lengths(self) -> list[int]:
        """Tokens of the step's sequences before it."""
        return [self._lengths[s] for s in self._step[0]]

    def _turn(self, kind: str) -> int:
        self._served[kind] += 1
        return self._served[kind] - 1

    def _state_mixers(self) -> list[Mamba2]:
        return [m for m in self.mixers if isinstance(m, Mamba2)]

    def _add(self, length: int, states: list[MixerState]) -> int:
        self._next += 1  # pools see the same calls, so that they give a sequence the same number
        self._lengths[self._next - 1], self._states[self._next - 1] = length, states
        return self._next - 1


def _pools_of(mixer: nn.Module | None) -> tuple[str, ...]:
    """The pools that a mixer keeps its pages in."""
    if isinstance(mixer, Attention):
        return ("attention",)
    if isinstance(mixer, SparseAttention):  # apart from the others: block means are kept for all layers of a pool
        return ("sparse",) if mixer.index is None else ("tokens", "index")
    return ("latent",) if isinstance(mixer, MLA) else ()


def _new_pool(name: str, mixer: nn.Module | None, sizes: tuple[int, int, int]) -> ki.PagedKVCache:
    """A pool for mixers like this one; ``sizes`` are layers, pages and tokens of a page."""
    if isinstance(mixer, MLA):
        like, width = mixer.norm, mixer.latent + mixer.rope_dim
        return PagedLatentCache(*sizes, width, dtype=like.dtype, device=like.device)
    assert isinstance(mixer, Attention | SparseAttention)
    like = mixer.k.weight
    if name == "index" and isinstance(mixer, SparseAttention) and mixer.index is not None:
        return PagedLatentCache(*sizes, mixer.index.k.out_features, dtype=like.dtype, device=like.device)
    return ki.PagedKVCache(*sizes, mixer.kv_heads, mixer.head_dim, dtype=like.dtype, device=like.device)

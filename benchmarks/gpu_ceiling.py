"""The least time of a training step on a GPU, by block letter: its products, and the bytes that its other passes move.

Products run at ``PRODUCTS`` FLOP/s and passes over memory at ``BANDWIDTH`` B/s, one after another.  A pass moves what
its family's README counts; what a product reads and writes is hidden behind its arithmetic.  Streams, norms and the
loss are ``rest``.  Launches, sorts, small sums and casts count as nothing, so no step can reach it.
"""

from collections import Counter
from typing import NamedTuple

from kernel_index.lm.config import ModelConfig

PRODUCTS = 790e12
BANDWIDTH = 4.2e12
LOW = 2
"""Bytes of an element under autocast."""


class Work(NamedTuple):
    """Of one token: FLOPs of its products forward, and bytes of all other passes forward and backward."""

    flops: float
    forward: float
    backward: float

    def seconds(self, tokens: int, recompute: bool) -> float:
        flops = self.flops * (4 if recompute else 3)
        moved = self.backward + self.forward * (2 if recompute else 1)
        return tokens * (flops / PRODUCTS + moved / BANDWIDTH)


def attention(c: ModelConfig, keys: float) -> Work:
    """Projections, scores and values of the keys seen; q and k are rotated in one pass each way."""
    weights = c.dim * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    rotated = 2 * LOW * c.head_dim * (c.heads + c.kv_heads)
    return Work(2 * weights + 4 * c.heads * c.head_dim * keys, rotated, rotated)


def latent(c: ModelConfig, keys: float) -> Work:
    """The latent's norm, the rotation and one copy of q and of k each way."""
    wide, rank, rope = c.heads * c.head_dim, c.latent.latent, c.heads * c.latent.rope
    weights = c.dim * (2 * wide + rope + c.latent.rope + rank) + 2 * rank * wide
    moved = LOW * (2 * rank + 2 * rope + 4 * (wide + rope))
    return Work(2 * weights + 2 * c.heads * (2 * c.head_dim + c.latent.rope) * keys, moved, moved)


def mixer(c: ModelConfig) -> Work:
    """Convolution 4 and 6 bytes an element, gated norm 6 and 10; the scan's states go through memory once each way."""
    s, chunk = c.state_space, 64
    inner = s.heads * s.head_dim
    wide = inner + 2 * s.state
    states = 2 * LOW * inner * s.state / chunk
    scan = 2 * inner * chunk + 4 * inner * s.state
    weights = c.dim * (3 * inner + 2 * s.state + s.heads)
    forward = 2 * LOW * wide + 3 * LOW * inner + 3 * LOW * inner + states
    backward = 3 * LOW * wide + 5 * LOW * inner + 6 * LOW * inner + 2.5 * states
    return Work(2 * weights + scan, forward, backward)


def experts(c: ModelConfig) -> Work:
    """Router, dispatch, combine, and the activations of the selected experts and of the shared one."""
    e = c.experts
    matrices = 3 if c.activation == "swiglu" else 2
    weights = c.dim * e.count + matrices * c.dim * (e.topk * e.hidden + e.shared)
    rows, active = LOW * c.dim, LOW * (matrices - 1) * (e.topk * e.hidden + e.shared)
    forward = rows * (1 + (1 + e.topk) + (e.topk + 2)) + active + active / (matrices - 1)
    backward = rows * (2 + (1 + e.topk) + (1 + 2 * e.topk) + 2 * 3) + 2 * active + active / (matrices - 1)
    return Work(2 * weights, forward, backward)


def rest(c: ModelConfig) -> Work:
    """Streams of each layer 10 and 15 elements a channel, norms; the loss is four products and two passes."""
    size = 4 if c.residual in ("fp32", "mhc") else LOW
    layers = len(c.pattern)
    streams = (10 * c.dim * size, 15 * c.dim * size) if c.residual.startswith("mhc") else (3 * c.dim * size,) * 2
    norm = c.dim * (size + LOW), c.dim * (LOW + 2 * size)
    ends = 10 * c.dim * size
    logits = c.padded_vocab * LOW
    forward, backward = (layers * (s + n) + ends for s, n in zip(streams, norm, strict=True))
    # Of 4 products of the loss 3 are those that ``seconds`` counts.
    return Work(2 * c.dim * c.padded_vocab * 4 / 3, forward + logits, backward + 2 * logits)


def ceilings(c: ModelConfig, tokens: int, recompute: bool) -> dict[str, float]:
    """Seconds of a step by letter.  The streams and the loss are not computed again."""
    found: Counter[str] = Counter()
    for i, letter in enumerate(c.pattern):
        window = c.windows[i]
        keys = c.context / 2 if window is None else min(window + 1, c.context / 2)
        if letter == "S":
            keys = min(keys, c.sparse.topk * c.sparse.block)
        work = {"A": attention, "S": attention, "L": latent}.get(letter)
        of_letter = work(c, keys) if work else mixer(c) if letter == "M" else experts(c)
        found[letter] += of_letter.seconds(tokens, recompute)
        if letter in "ASL" and c.hidden:
            weights = (3 if c.activation == "swiglu" else 2) * c.dim * c.hidden
            found["mlp"] += Work(2 * weights, 3 * LOW * c.hidden, 5 * LOW * c.hidden).seconds(tokens, recompute)
    found["rest"] = rest(c).seconds(tokens, False)
    return dict(found)

"""The dropout mask: Philox-4x32-10 of (seed, element index), in integer arithmetic that every backend can repeat.

Number the elements in row-major order and group them into blocks of 64.  One Philox call serves four elements at a
distance of 16: element ``e`` takes word ``(e // 16) % 4`` of the call ``16·(e // 64) + e % 16``.  The 128-bit counter
is ``(call mod 2³², call >> 32, 0, 0)``, the key is ``(seed mod 2³², (seed >> 32) mod 2³²)``.  The element is kept if
its word, an unsigned 32-bit integer, is at least ``round(p·2³²)``.  See docs/decisions/0003-dropout-mask.md.
"""

import math

import torch
from torch import Tensor

LANES = 16
"""Distance between two elements that share a Philox call: one AVX-512 register of float32."""
BLOCK = 4 * LANES
"""Elements that one group of LANES calls serves."""

_MULTIPLIERS = 0xD2511F53 - 2**32, 0xCD9E8D57 - 2**32
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW = 0xFFFFFFFF


def philox_words(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words in [0, 2³²) for each counter; counter and key are int64 tensors of 32-bit values, broadcast together.

    The multipliers are taken minus 2³²: the product then fits into a signed 64-bit integer, whose overflow is undefined
    in the C++ that Inductor writes, and the high half of the true product is the shifted one plus the factor.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((b >> 32) + c2) ^ c1 ^ k0, b & _LOW, ((a >> 32) + c0) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def block_words(blocks: int, seed: Tensor) -> tuple[Tensor, ...]:
    """Four tensors ``[blocks, LANES]``; word j belongs to the elements ``BLOCK·block + LANES·j + lane``."""
    call = torch.arange(blocks * LANES, device=seed.device).view(blocks, LANES)
    zero = torch.zeros_like(call)
    return philox_words((call & _LOW, call >> 32, zero, zero), (seed & _LOW, (seed >> 32) & _LOW))


def keep_mask(shape: torch.Size | tuple[int, ...], seed: Tensor, threshold: Tensor) -> Tensor:
    """The mask as a bool tensor, True where the element is kept."""
    count = math.prod(shape)
    blocks = (count + BLOCK - 1) // BLOCK
    keep = torch.stack([word >= threshold for word in block_words(blocks, seed)], dim=1)
    return keep.view(-1)[:count].view(shape)


def keep_bits(blocks: int, seed: Tensor, threshold: Tensor) -> Tensor:
    """The mask as int32 ``[blocks, LANES]``: bit j says whether element ``BLOCK·block + LANES·j + lane`` is kept."""
    bits = [torch.where(word >= threshold, 1 << j, 0) for j, word in enumerate(block_words(blocks, seed))]
    return (bits[0] | bits[1] | bits[2] | bits[3]).to(torch.int32)


def threshold_and_scale(p: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many of the 2³² words drop an element, int64, and what a kept element is multiplied by, float64.

    Tensors, so that another p is not compiled anew.  The threshold of p = 1 is 2³², above every word; the factor
    is held finite there, because 0 times infinity would be a NaN in the gradient.
    """
    drop = torch.ones((), dtype=torch.float64, device=device) * p
    return (drop * 2.0**32).round().to(torch.int64), (1.0 - drop).clamp_min(2.0**-53).reciprocal()


def _number(seed: int, device: torch.device) -> Tensor:
    return torch.full((), seed, dtype=torch.int64, device=device)


# Inductor folds a constant seed into the rounds, and inlines rounds that read no tensor into one another: the code
# doubles with each of the ten, and takes minutes to write.  The result of an op is a tensor to it, which prevents that.
torch.library.define("kernel_index::dropout_seed", "(SymInt seed, Device device) -> Tensor")
torch.library.impl("kernel_index::dropout_seed", "CompositeExplicitAutograd", _number)
torch.library.register_fake("kernel_index::dropout_seed", _number)


def seed_tensor(seed: int | Tensor | None, p: float, device: torch.device) -> Tensor | None:
    """The seed as an int64 scalar tensor, drawn from the device's default generator if it is None.

    None where ``p`` is 0: no random number is used there, and none is drawn.
    """
    if p <= 0.0:
        return None
    if seed is None:
        drawn = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
        # Inductor would draw the same number again at each use, that is for each element; a scan's result is stored.
        return (drawn.cumsum(0) if torch.compiler.is_compiling() else drawn).view(())
    if isinstance(seed, Tensor):
        return seed.detach().reshape(())
    number = torch.ops.kernel_index.dropout_seed.default if torch.compiler.is_compiling() else _number
    return number(seed, device)

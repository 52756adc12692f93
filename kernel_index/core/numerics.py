"""One numeric contract: ``with ki.numerics("invariant")``, and what a backend declares to take part in it.

An invariant backend computes each row by a fixed recipe, so its bits depend on that row's own sequence alone: not on
the other rows of the batch, on the packing, on a cache, on the number of threads, on gradients or on compilation.
``choose`` then asks no rule of speed, and a function without such a backend raises ``Ineligible``.
See docs/decisions/0024-invariant-numerics.md.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Literal

from kernel_index.core import force
from kernel_index.core.rounding import rounding_as_written

Mode = Literal["ordinary", "invariant"]
FOR_THE_MODE = "has no advantage but its recipe: numerics('invariant') takes it"
NO_RECIPE = "has no invariant form, which numerics('invariant') needs"


class Ineligible(ValueError):
    """The requested backend may not run this call; the message lists the rule that each candidate broke.

    >>> import torch, kernel_index as ki
    >>> try:
    ...     ki.fused_relu_squared(torch.ones(3, device="meta"), backend="inductor")
    ... except ki.Ineligible as error:
    ...     print(error)
    fused_relu_squared: backend='inductor' cannot run this call (inductor: needs CPU tensors)
    """


class Recipe:
    """How an invariant backend computes a row: what decides its bits, in words that change when the bits may."""

    def __init__(self, text: str):
        self.text, self.hash = text, hashlib.sha256(text.encode()).hexdigest()[:12]


@contextlib.contextmanager
def numerics(mode: Mode) -> Iterator[None]:
    """Inside the block with ``"invariant"``, a row's bits depend on its own sequence alone.

    Every function then chooses by dtype, device and contract, never by size, gradients or compilation, and computes
    each row of its result by a fixed recipe.  So training, cached decoding, any batch, packing, page order, chunked
    prefill and number of threads give the same bits on one kind of device.  ``Receipt.numerics`` holds the hash of the
    recipe: equal hashes on one kind of device mean equal bits.

    It is in force as ``ki.force`` is: for the thread that entered, for the backward and the recomputation of calls made
    inside, and for compiled code.  Blocks nest.  ``KERNEL_INDEX_NUMERICS=invariant`` is the same for the whole process.

    Args:
        mode: ``"invariant"``; or ``"ordinary"``, which is what holds outside of any block.

    Raises:
        ValueError: another mode.
        Ineligible: inside the block, from a function that has no invariant form for its call.

    >>> import torch, kernel_index as ki
    >>> with ki.receipts() as log, ki.numerics("invariant"):
    ...     _ = ki.fused_relu_squared(torch.ones(3))
    >>> len(log[0].numerics)
    12
    """
    check_mode("mode", mode)
    outermost = mode == "invariant" and not is_invariant()
    with force.in_block(force.NUMERICS, backend=mode), rounding_as_written() if outermost else contextlib.nullcontext():
        yield


def check_mode(name: str, mode: object) -> None:
    if mode not in ("ordinary", "invariant"):
        raise ValueError(f"{name} must be 'invariant' or 'ordinary', got {mode!r}")


def not_worth(*_: object) -> str:
    """The rule by which ``auto`` passes over a backend in ordinary mode that is there for its recipe."""
    return FOR_THE_MODE


def is_invariant() -> bool:
    """Whether invariant numerics are in force here."""
    return force.numerics_here() == "invariant"


def needs_ordinary_numerics(name: str, reason: str) -> None:
    """Refuse ``numerics("invariant")`` where something without backends has no invariant form."""
    if is_invariant():
        raise Ineligible(f"{name}: numerics('invariant') cannot run this call ({reason})")

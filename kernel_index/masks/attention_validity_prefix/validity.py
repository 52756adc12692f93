"""``AttentionValidity``: how many leading tokens of each row are valid."""

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from kernel_index.core import checks
from kernel_index.core.rules import host_readable
from kernel_index.core.transfers import to_device
from kernel_index.masks.attention_validity_prefix import contract

ValidityMode = Literal["none", "token_prefix", "slot_prefix"]
MODES: tuple[ValidityMode, ...] = get_args(ValidityMode)
SLOT_TILE_MISMATCH = "slot_tile_mismatch"


@dataclass(frozen=True, eq=False)
class AttentionValidity:
    """The valid prefix of each row; made by ``attention_validity``, immutable.

    In mode ``none`` no counts are given and every token is valid.  Counts of zero are different: they say that no token
    of the row is valid.  ``slot_prefix`` counts blocks of ``base_block_tokens`` tokens; a token prefix that is also
    given trims the last block.

    Two validities are equal when their modes, block sizes and counts are.  The counts must be on one device and are
    compared by value, so ``==`` waits for an accelerator, as ``torch.equal`` does; this library does not call it there.
    The hash is made of mode, block size and number of rows, and reads no tensor.  Equality and hash ignore ``reason``.

    Args:
        mode: ``"none"``, ``"token_prefix"`` or ``"slot_prefix"``.
        token_prefix: int64 [B], in tokens, or None.
        slot_counts: int64 [B], in blocks, or None.
        base_block_tokens: tokens for each block, or None.
        reason: why ``resolve`` dropped the slot counts; empty otherwise.

    >>> import torch, kernel_index as ki
    >>> ki.attention_validity(valid_token_counts=torch.tensor([3, 0])).mode
    'token_prefix'
    """

    mode: ValidityMode = "none"
    token_prefix: Tensor | None = None
    slot_counts: Tensor | None = None
    base_block_tokens: int | None = None
    reason: str = field(default="")

    def __post_init__(self) -> None:
        checks.one_of("mode", self.mode, MODES)
        for name in ("token_prefix", "slot_counts"):
            value = getattr(self, name)
            if value is not None:
                checks.is_tensor(name, value)
                checks.has_dtype(name, value, torch.int64, "(attention_validity converts)")
                checks.has_rank(name, value, 1, "one count for each row, shape [B]")
        contract.check_same_rows(self.token_prefix, self.slot_counts)
        if (self.mode == "slot_prefix") != (self.slot_counts is not None):
            raise ValueError(
                f"slot_counts must be given for mode 'slot_prefix' and for no other, got mode {self.mode!r}"
            )
        if self.mode == "slot_prefix" and self.base_block_tokens is None:
            raise ValueError("base_block_tokens must be a positive integer where slot counts are given, got None")
        if self.mode != "slot_prefix" and (self.mode == "token_prefix") != (self.token_prefix is not None):
            raise ValueError(f"token_prefix must be given for mode 'token_prefix', got mode {self.mode!r}")

    @property
    def counts(self) -> Tensor | None:
        """The slot counts, else the token prefix, [B]; None for mode ``none``."""
        return self.slot_counts if self.slot_counts is not None else self.token_prefix

    @property
    def batch_size(self) -> int | None:
        """B; None for mode ``none``, which fits any batch."""
        return None if self.counts is None else self.counts.shape[0]

    def resolve(self, tile_size: int) -> "AttentionValidity":
        """The form that a kernel with tiles of ``tile_size`` tokens can use.

        Slot counts are kept only if ``base_block_tokens`` is ``tile_size``.  Otherwise the result has the token prefix
        alone, or mode ``none`` without one, and its ``reason`` is ``slot_tile_mismatch``.
        """
        checks.is_int("tile_size", tile_size, minimum=1)
        if self.mode != "slot_prefix" or self.base_block_tokens == tile_size:
            return self
        mode: ValidityMode = "none" if self.token_prefix is None else "token_prefix"
        return AttentionValidity(mode, self.token_prefix, None, None, SLOT_TILE_MISMATCH)

    @property
    def tokens(self) -> Tensor | None:
        """Valid tokens of each row, int64 [B], not limited by a row length; None for mode ``none``."""
        if self.mode == "none":
            return None
        if self.slot_counts is None or self.base_block_tokens is None:
            return None if self.token_prefix is None else self.token_prefix.clamp(min=0)
        tokens = self.slot_counts * self.base_block_tokens
        if self.token_prefix is not None:
            tokens = torch.minimum(tokens, self.token_prefix)
        return tokens.clamp(min=0)

    def token_counts(self, seq_len: int) -> Tensor | None:
        """Valid tokens of each row of length ``seq_len``, int64 [B] within 0…seq_len; None for mode ``none``."""
        checks.is_int("seq_len", seq_len, minimum=0)
        tokens = self.tokens
        return None if tokens is None else tokens.clamp(max=seq_len)

    def key_padding(self, seq_len: int) -> Tensor | None:
        """Bool [B, seq_len], True where the token is valid; None for mode ``none``."""
        tokens = self.token_counts(seq_len)
        if tokens is None:
            return None
        return torch.arange(seq_len, device=tokens.device) < tokens[:, None]

    def is_full(self, seq_len: int) -> bool:
        """Whether all of ``seq_len`` tokens are known to be valid in every row.

        False also where the counts cannot be read: on an accelerator, inside torch.compile, a mode or a transform.
        """
        tokens = self.token_counts(seq_len)
        if tokens is None:
            return True
        return host_readable(tokens) and bool((tokens == seq_len).all())

    def to(self, device: torch.device | str) -> "AttentionValidity":
        """The same counts on another device; ``self`` if they are on it already."""
        there = torch.device(device)
        token_prefix = None if self.token_prefix is None else to_device(self.token_prefix, there)
        slot_counts = None if self.slot_counts is None else to_device(self.slot_counts, there)
        if token_prefix is self.token_prefix and slot_counts is self.slot_counts:
            return self
        return AttentionValidity(self.mode, token_prefix, slot_counts, self.base_block_tokens, self.reason)

    def pin_memory(self) -> "AttentionValidity":
        """The same counts in pinned memory, from which copies to a GPU need not wait; a DataLoader calls it."""
        token_prefix = None if self.token_prefix is None else self.token_prefix.pin_memory()
        slot_counts = None if self.slot_counts is None else self.slot_counts.pin_memory()
        return AttentionValidity(self.mode, token_prefix, slot_counts, self.base_block_tokens, self.reason)

    def __reduce__(self) -> tuple:
        # A pickle calls the class, so that what a file holds is checked.
        return AttentionValidity, (
            self.mode, self.token_prefix, self.slot_counts, self.base_block_tokens, self.reason,
        )  # fmt: skip

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AttentionValidity):
            return NotImplemented
        return (
            (self.mode, self.base_block_tokens) == (other.mode, other.base_block_tokens)
            and same_values(self.token_prefix, other.token_prefix)
            and same_values(self.slot_counts, other.slot_counts)
        )

    def __hash__(self) -> int:
        return hash((self.mode, self.base_block_tokens, self.batch_size))


torch.serialization.add_safe_globals([AttentionValidity])
"""``torch.load`` takes it from files that are not trusted: it holds tensors and numbers, and checks them."""


def same_values(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal tensors on one device, or both absent."""
    if a is None or b is None or a is b:
        return a is b
    return a.device == b.device and torch.equal(a, b)

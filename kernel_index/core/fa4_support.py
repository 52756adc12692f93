"""Which calls flash-attn-4 supports on which architecture, from the source of version 4.0.0b36.

Every row follows the package's own assertions.  ``compiled`` says whether this project has compiled the decoding calls
of ``fa4.py`` and the kernels of ``kernel-index prove fa4`` for that architecture with the real package.
"""

from dataclasses import dataclass

PACKAGE = "flash-attn-4 4.0.0b36"


@dataclass(frozen=True, slots=True)
class Support:
    """What one architecture supports.

    ``paged``: a page table with ``seqused_k``.  ``varlen``: ragged lengths in one call, packed or by ``seqused_k``.
    ``split``: more than one split of the keys.  ``head_sizes``: (smallest, largest), in multiples of 8;
    ``extra_head_sizes`` are allowed too.  ``paged_head_multiple``: head sizes of a paged call are multiples of it,
    because a page that is not one key tile is loaded by cp.async, which takes no padded head size.
    """

    paged: bool
    varlen: bool
    split: bool
    window: bool
    softcap: bool
    sink: bool
    head_sizes: tuple[int, int]
    extra_head_sizes: tuple[int, ...] = ()
    paged_head_multiple: int = 16
    compiled: bool = False

    def takes_head_size(self, size: int) -> bool:
        low, high = self.head_sizes
        return size % 8 == 0 and (low <= size <= high or size in self.extra_head_sizes)


HOPPER = Support(
    paged=True, varlen=True, split=False, window=True, softcap=True, sink=True, head_sizes=(8, 256), compiled=True
)
BLACKWELL = Support(
    paged=True, varlen=True, split=True, window=True, softcap=True, sink=True, head_sizes=(8, 128),
    extra_head_sizes=(256,), compiled=True,
)  # fmt: skip
AMPERE = Support(
    paged=False, varlen=True, split=False, window=True, softcap=True, sink=False, head_sizes=(8, 128)
)  # larger heads would depend on the size of shared memory

TABLE: dict[int, Support] = {8: AMPERE, 9: HOPPER, 10: BLACKWELL, 11: BLACKWELL, 12: AMPERE}
"""By the major compute capability: 8 Ampere and Ada, 9 Hopper, 10 and 11 data-centre Blackwell, 12 consumer Blackwell,
whose kernel is the Ampere one with less shared memory."""


def support_of(arch: int | str) -> Support | None:
    """The row of ``Target.arch`` (90 for sm_90), or None for an architecture that the package does not know."""
    return TABLE.get(arch // 10) if isinstance(arch, int) else None

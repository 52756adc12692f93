"""The static choices of clustered attention."""

from dataclasses import dataclass

from kernel_index.core import checks
from kernel_index.routing.union_selection_query_mask.contract import MODES, UnionMode


@dataclass(frozen=True, slots=True)
class ClusteredSparseConfig:
    """The static choices of ``clustered_sparse_attention``; holds no tensor, so it can key a cache.

    Args:
        block_size: keys of a block.
        topk: blocks for each query, the current one counted.
        query_tile_size: queries whose selections are joined.
        hierarchy: ``(ratio, topc)`` to score groups of ``ratio`` blocks first, then only the children of the ``topc``
            best groups; None scores every legal block.
        fused_scoring: take the best blocks chunk by chunk of queries, so that the scores of all are never held.
        union_mode: ``"bitmap"``, ``"sort"`` or ``"auto"``, as of ``union_selection``.
        dense_above: attend densely where a tile's union holds more than this share of the blocks, on average; the
            receipt says so.  Reading the share waits for the device, so None, the default, never does, and inside of
            torch.compile and of transforms no backend takes any other value.
        report_unions: put U/n and U/blocks into the receipt; waits for the device, too, with the same limit.

    Raises:
        TypeError, ValueError: a field breaks its rule.

    >>> import kernel_index as ki
    >>> ki.ClusteredSparseConfig(topk=0)
    Traceback (most recent call last):
        ...
    ValueError: topk must be at least 1, got 0
    """

    block_size: int = 64
    topk: int = 16
    query_tile_size: int = 64
    hierarchy: tuple[int, int] | None = None
    fused_scoring: bool = True
    union_mode: UnionMode = "auto"
    dense_above: float | None = None
    report_unions: bool = False

    @property
    def reads_unions(self) -> str | None:
        """The name of the field that asks for the sizes of unions, which are read on the host; None for none."""
        if self.dense_above is not None:
            return "dense_above"
        return "report_unions" if self.report_unions else None

    def __post_init__(self) -> None:
        for name in ("block_size", "topk", "query_tile_size"):
            checks.is_int(name, getattr(self, name), minimum=1)
        if self.hierarchy is not None:
            if not isinstance(self.hierarchy, tuple) or len(self.hierarchy) != 2:
                raise TypeError(f"hierarchy must be a pair (ratio, topc) or None, got {self.hierarchy!r}")
            for i, size in enumerate(self.hierarchy):
                checks.is_int(f"hierarchy[{i}]", size, minimum=1)
        checks.is_bool("fused_scoring", self.fused_scoring)
        checks.one_of("union_mode", self.union_mode, MODES)
        if self.dense_above is not None:
            checks.is_real("dense_above", self.dense_above)
            if self.dense_above < 0:
                raise ValueError(f"dense_above must be at least 0, a share of the blocks, got {self.dense_above}")
        checks.is_bool("report_unions", self.report_unions)

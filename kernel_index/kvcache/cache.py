"""KV-cache bookkeeping: capacity, per-layer progress within a step, sequence lengths."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import checks
from kernel_index.kvcache.block_means import BlockMeans, Row
from kernel_index.kvcache.slots import append, gathered, slots
from kernel_index.kvcache.step_tensors import StepTensors


@dataclass
class CacheCounters:
    """How often a cache did what: reads and writes count per layer and step, advances per step, the others per page."""

    reads: int = 0
    writes: int = 0
    advances: int = 0
    allocated: int = 0
    freed: int = 0
    copied: int = 0
    zeroed: int = 0


class KVCache(ABC):
    """Keys and values of every layer.  A step is ``begin``, then ``layer`` or ``append`` once for each layer, then
    ``advance``.  All layers of a step see the same lengths; ``begin`` abandons a step that was not advanced.

    The tensors that ``layer`` hands out are written anew by the next ``begin`` of as many rows: a CUDA graph of one
    step's calls, captured once, serves every later step.
    """

    def __init__(
        self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device | str, names: str
    ):
        for name, size in zip(names.split(), shape, strict=True):
            checks.is_int(name, size, minimum=1)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype}")
        checks.is_device("device", device)
        with torch.inference_mode(False):  # a cache outlives the mode of its construction
            self.k = torch.zeros(shape, dtype=dtype, device=device)
            self.v = torch.zeros(shape, dtype=dtype, device=device)
            self._scratch = torch.empty(0, dtype=dtype, device=device)
        self.counters = CacheCounters()
        self._step: _Step | None = None
        self._tensors: dict[int, StepTensors] = {}  # by how many rows they hold, a power of 2
        # By block size, and for values by size and name, from the first call of block_means on.
        self._means: dict[int | tuple[int, str], BlockMeans] = {}

    @property
    def layers(self) -> int:
        return self.k.shape[0]

    def layer(self, index: int) -> "CacheLayer":
        """The cache arguments of ``fa4_kvcache_decode`` for one layer of this step; counts its read and its write."""
        step = self._serve(index)
        self.counters.reads += 1
        self.counters.writes += step.tokens > 0
        return CacheLayer(self, index, step)

    def peek(self, index: int) -> "CacheLayer":
        """What ``layer`` would return, without counting as the layer's call in this step."""
        step = self._open()
        self._check_unserved(index, step)
        return CacheLayer(self, index, step)

    def append(self, index: int, k: Tensor, v: Tensor) -> None:
        """Write one layer's k and v [B, tokens, K, D] without attending; counts a write."""
        step = self._open()
        shape = (step.lengths.shape[0], step.tokens, *self.k.shape[-2:])
        for name, value in (("k", k), ("v", v)):
            checks.is_tensor(name, value)
            checks.has_shape(name, value, shape, "[B, tokens, K, D] of this step")
            checks.has_dtype(name, value, self.k.dtype, "like the cache")
            checks.on_device(name, value, self.k, "the cache")
        self._serve(index)
        self.counters.writes += 1
        append(self.k[index], self.v[index], step.lengths, k, v, step.table)

    def advance(self, tokens: Sequence[int] | None = None) -> None:
        """Count the new tokens as cached: once per step, after every layer.

        ``tokens`` keeps only the first so many of each row, for prompts that were padded to one length.
        """
        step = self._open()
        missing = [i for i in range(self.layers) if i not in step.served]
        if missing:
            raise ValueError(f"advance must be called after every layer of the step, got none for {missing}")
        rows = step.lengths.shape[0]
        kept = [step.tokens] * rows if tokens is None else list(tokens)
        if len(kept) != rows or not all(isinstance(n, int) and 0 <= n <= step.tokens for n in kept):
            raise ValueError(f"tokens must be {rows} numbers from 0 to {step.tokens}, got {kept}")
        self._advance(kept)
        for means in self._means.values():
            means.confirm(step.rows, kept)
        self.counters.advances += 1
        self._step = None

    @abstractmethod
    def _advance(self, tokens: list[int]) -> None:
        """Add to the lengths of the step's rows."""

    def _begin(self, names: list[int], lengths: list[int], tokens: int, table: list[list[int]] | None) -> None:
        room = 1 << max(0, len(names) - 1).bit_length()
        if room not in self._tensors:
            columns = 0 if table is None else self.k.shape[1]  # no row has more pages than there are
            self._tensors[room] = StepTensors(room, columns, self.k.device)
        before = self._tensors[room].send_lengths(lengths)
        ids = None if table is None else self._tensors[room].send_table(table)
        pages = [None] * len(names) if table is None else table
        rows = [Row(name, n, n + tokens, p) for name, n, p in zip(names, lengths, pages, strict=True)]
        self._step = _Step(tokens, before, ids, set(), rows)

    def _open(self) -> "_Step":
        if self._step is None:
            raise ValueError("begin must be called before a step's layers, got no step under way")
        return self._step

    def _serve(self, index: int) -> "_Step":
        step = self._open()
        self._check_unserved(index, step)
        step.served.add(index)
        return step

    def _check_unserved(self, index: int, step: "_Step") -> None:
        checks.is_int("index", index, minimum=0)
        if index >= self.layers or index in step.served:
            raise ValueError(f"index must be a layer below {self.layers} not yet served in this step, got {index}")


def _sent(numbers: list[Any], device: torch.device) -> Tensor:
    """Numbers of the host as int32 on a device, without waiting for it."""
    return torch.tensor(numbers, dtype=torch.int32, device="cpu").to(device, non_blocking=True)


@dataclass(frozen=True)
class _Step:
    tokens: int
    lengths: Tensor
    table: Tensor | None
    served: set[int]
    rows: list[Row]


class AlignedKeys(NamedTuple):
    """``keys`` [B, S, K, D], and the column ``first`` of each row's first token, int64 [B].

    The columns before it repeat that token, so that they hold nothing that was never written.
    """

    keys: Tensor
    first: Tensor


class CacheLayer(dict[str, Any]):
    """The arguments of ``fa4_kvcache_decode`` for one layer of one step, and the cache's bookkeeping of that step.

    >>> import torch, kernel_index as ki
    >>> cache = ki.ContiguousKVCache(1, 1, 8, 1, 2)
    >>> cache.begin(5)
    >>> layer = cache.layer(0)
    >>> sorted(layer), layer.new_tokens, layer.lengths_after
    (['block_table', 'cache_seqlens', 'k_cache', 'v_cache'], 5, [5])
    """

    def __init__(self, cache: KVCache, index: int, step: _Step):
        super().__init__(
            k_cache=cache.k[index], v_cache=cache.v[index], cache_seqlens=step.lengths, block_table=step.table
        )
        self._cache, self._index, self._step = cache, index, step
        self.written = False

    @property
    def new_tokens(self) -> int:
        """Tokens that the step adds to each row."""
        return self._step.tokens

    @property
    def lengths_after(self) -> list[int]:
        """Tokens of each row, this step's included; known on the host, so that nothing waits for a device."""
        return [row.after for row in self._step.rows]

    def write(self, k: Tensor, v: Tensor) -> None:
        """Write this step's keys and values [B, tokens, K, D]; the decoding functions do it themselves.

        Needed only before ``block_means`` or another look at the new keys.  ``written`` is True from then on, so that
        ``selected_decode`` does not write them again.
        """
        self.written = True
        append(self["k_cache"], self["v_cache"], self["cache_seqlens"], k, v, self["block_table"])

    def prefix(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, n, K, D] of one row, this step's included once they are written; a copy where paged."""
        table, total = self._step.table, self._step.rows[row].after
        one = slice(row, row + 1)
        if table is None:
            return self["k_cache"][one, :total], self["v_cache"][one, :total]
        k, v = (gathered(self[name], table[one])[:, :total] for name in ("k_cache", "v_cache"))
        return k, v

    def right_aligned_keys(self) -> "AlignedKeys":
        """A copy of the keys of all rows, this step's included once they are written, that end in the same column.

        Rows of different lengths then share one mask: the queries of each end where its keys end.

        >>> import torch, kernel_index as ki
        >>> cache = ki.ContiguousKVCache(1, 2, 8, 1, 1)
        >>> cache.begin(3)
        >>> cache.append(0, torch.arange(6.0).view(2, 3, 1, 1), torch.zeros(2, 3, 1, 1))
        >>> cache.advance([3, 1])
        >>> cache.begin(0)
        >>> aligned = cache.layer(0).right_aligned_keys()
        >>> aligned.keys[..., 0, 0].tolist(), aligned.first.tolist()
        ([[0.0, 1.0, 2.0], [3.0, 3.0, 3.0]], [0, 2])
        """
        k_cache, lengths = self["k_cache"], self.lengths_after
        longest = max(lengths, default=0)
        first = longest - _sent(lengths, k_cache.device).to(torch.int64)
        token = torch.arange(longest, device=k_cache.device) - first[:, None]
        page = k_cache.shape[1]
        index = slots(self["block_table"], token.clamp_min(0), page).flat(page)
        return AlignedKeys(k_cache.flatten(0, 1)[index], first)

    def scratch(self, elements: int) -> Tensor:
        """Memory of the cache's dtype for one call, [elements]; the next call overwrites it.

        Reuses one buffer: allocating and page-faulting new memory each step costs more than the copy.
        """
        if self._cache._scratch.numel() < elements:
            with torch.inference_mode(False):
                self._cache._scratch = torch.empty(elements, dtype=self._cache.k.dtype, device=self._cache.k.device)
        return self._cache._scratch[:elements]

    def block_means(self, block_size: int, *, values: bool = False) -> Tensor:
        """The mean key of each complete block, [B, blocks, K, D], at least float32: what a router scores.

        With ``values`` the mean value of each, which attention over compressed blocks needs, too.  Call it after this
        step's keys are written.  A block is averaged once, in the step that completes it; the first call for a block
        size averages all complete blocks.  ``blocks`` is that of the longest row.

        Raises:
            ValueError: the block size is not positive, or the step has been closed.

        >>> import torch, kernel_index as ki
        >>> cache = ki.ContiguousKVCache(1, 1, 8, 1, 2)
        >>> cache.begin(5)
        >>> layer, k = cache.layer(0), torch.arange(10.0).view(1, 5, 1, 2)
        >>> _ = ki.fa4_kvcache_decode(k, k=k, v=k, **layer)
        >>> layer.block_means(2)[0, :, 0]
        tensor([[1., 2.],
                [5., 6.]])
        """
        return self._means_of(block_size, values).of(self._index, self._step.rows, self._step.table)

    def stored_means(self, block_size: int) -> Tensor:
        """The memory of the block means, [rows or pages, units, K, D], for a kernel that writes this step's keys.

        It holds those of all blocks that were complete before the step; the kernel must write those that it completes.
        """
        return self._means_of(block_size).stored(self._index, self._step.rows)

    def _means_of(self, block_size: int, values: bool = False) -> BlockMeans:
        checks.is_int("block_size", block_size, minimum=1)
        name = (block_size, "values") if values else block_size
        cache = self._cache
        if cache._step is not self._step:
            raise ValueError("block_means must be called within the step of this layer, got a step that is over")
        if name not in cache._means:
            stored = cache.v if values else cache.k
            with torch.inference_mode(False):  # the means outlive the mode of this call
                cache._means[name] = BlockMeans(stored, block_size, paged=self._step.table is not None)
        return cache._means[name]


class ContiguousKVCache(KVCache):
    """A cache with one contiguous run of ``capacity`` tokens for each row.

    Args:
        layers, rows, capacity, kv_heads, head_dim: sizes of ``k`` and ``v`` [layers, rows, capacity, K, D].
        dtype: of keys and values.
        device: of keys and values.

    >>> import torch, kernel_index as ki
    >>> cache = ki.ContiguousKVCache(1, 2, 8, 1, 4)
    >>> x = torch.ones(2, 3, 1, 4)
    >>> cache.begin(3)
    >>> ki.fa4_kvcache_decode(x, k=x, v=x, **cache.layer(0)).shape
    torch.Size([2, 3, 1, 4])
    >>> cache.lengths
    [0, 0]
    >>> cache.advance([3, 2])
    >>> cache.lengths
    [3, 2]
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        names = "layers rows capacity kv_heads head_dim"
        super().__init__((layers, rows, capacity, kv_heads, head_dim), dtype, device, names)
        self.lengths = [0] * rows

    @property
    def capacity(self) -> int:
        return self.k.shape[2]

    def begin(self, tokens: int) -> None:
        """Open a step of so many new tokens in every row; 0 only reads."""
        checks.is_int("tokens", tokens, minimum=0)
        if max(self.lengths) + tokens > self.capacity:
            raise ValueError(f"tokens must be at most {self.capacity - max(self.lengths)}, the room left, got {tokens}")
        self._begin(list(range(len(self.lengths))), self.lengths, tokens, None)

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Reset rows (default: all) to length 0 and zero their keys and values."""
        chosen = list(range(len(self.lengths))) if rows is None else list(rows)
        for row in chosen:
            if not 0 <= row < len(self.lengths):
                raise ValueError(f"rows must be below {len(self.lengths)}, got {row}")
        self._step = None
        for row in chosen:
            self.lengths[row] = 0
            self.k[:, row] = 0
            self.v[:, row] = 0
            for means in self._means.values():
                means.forget(row)

    def _advance(self, tokens: list[int]) -> None:
        self.lengths = [a + b for a, b in zip(self.lengths, tokens, strict=True)]

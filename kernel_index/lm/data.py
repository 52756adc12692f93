"""Whole documents packed into rows, with document ids, positions, padding and valid counts.

A document is a start token and the bytes of a file.  A document longer than a row is split into consecutive
chunks.  Every byte is a target exactly once per epoch; none is dropped.
"""

import hashlib
import os
import sysconfig
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from kernel_index.core import checks
from kernel_index.core.by_content import best_fit

TEXT = "**/*"
"""The pattern of every text file of a folder: files that are not hidden and hold no NUL byte."""

PYTHON = "**/*.py"
"""The pattern of the default data, Python's standard library."""

START = 256
IGNORED = -100


class DataError(ValueError):
    """The data cannot be used; the message says which file or option is wrong, and why."""


class Batch(NamedTuple):
    """Rows of packed documents, each tensor int64.

    ``tokens`` ``targets`` ``positions`` ``doc_ids``: [B, T].  Padding has token START, target -100, document id -1.
    ``valid_counts``: [B], the tokens before the padding.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    doc_ids: Tensor
    valid_counts: Tensor

    def each(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A batch of what the function makes of each tensor: copies, or tensors on another device."""
        return type(self)(*map(function, self))

    @property
    def kind(self) -> Hashable:
        """What decides the sizes of all tensors of a training step."""
        return tuple(tensor.shape for tensor in self)

    @classmethod
    def of_prompt(cls, tokens: Tensor, row: int) -> "Batch":
        """One document in one row of fixed length, without targets."""
        count = tokens.numel()
        if not 0 < count <= row:
            raise ValueError(f"tokens must hold 1 to {row} tokens, got {count}")
        padded = torch.full((1, row), START)
        padded[0, :count] = tokens
        at = torch.arange(row).reshape(1, row)
        doc_ids = torch.where(at < count, 0, -1)
        return cls(padded, torch.full_like(padded, IGNORED), at, doc_ids, torch.tensor([count]))

    @classmethod
    def of_documents(cls, rows: Sequence[Sequence[Tensor]], length: int | None = None) -> "Batch":
        """Each row packs some documents, tokens [n]; rows are as long as the longest, or ``length``.

        Every token is the target of the one before it in its document.

        Raises:
            TypeError: a document is no tensor of whole numbers.
            ValueError: ``length`` is too small, or no row holds a token.

        >>> batch = Batch.of_documents([[torch.tensor([5, 6]), torch.tensor([7])], [torch.tensor([8])]])
        >>> batch.tokens.tolist(), batch.targets.tolist(), batch.doc_ids.tolist()
        ([[5, 6, 7], [8, 256, 256]], [[6, -100, -100], [-100, -100, -100]], [[0, 0, 1], [0, -1, -1]])
        """
        for document in (document for row in rows for document in row):
            checks.is_integer_tensor("a document", document)
        counts = [sum(len(document) for document in row) for row in rows]
        longest = max(counts, default=0)
        if not longest and not length:
            raise ValueError("rows must hold at least one token, got none")
        if length is not None and longest > length:
            raise ValueError(f"length must be at least {longest}, the longest row, got {length}")
        shape = len(rows), longest if length is None else length
        tokens, targets, doc_ids = (torch.full(shape, value) for value in (START, IGNORED, -1))
        positions = torch.zeros(shape, dtype=torch.int64)
        for row, documents in enumerate(rows):
            end = 0
            for number, document in enumerate(documents):
                start, end = end, end + len(document)
                tokens[row, start:end], targets[row, start : end - 1] = document, document[1:]
                positions[row, start:end], doc_ids[row, start:end] = torch.arange(len(document)), number
        return cls(tokens, targets, positions, doc_ids, torch.tensor(counts))


@dataclass(frozen=True)
class Chunk:
    """``length`` consecutive targets of a document: tokens [start, start + length) predict the ones after them."""

    document: int
    start: int
    length: int


def find_files(data: Path | None, pattern: str) -> tuple[Path, list[Path]]:
    """A folder and its files in a fixed order, by default of the running Python's standard library; or the one file."""
    root = Path(sysconfig.get_paths()["stdlib"]) if data is None else data
    if root.is_file():
        return root.parent, [root]
    if not root.is_dir():
        raise DataError(f"--data must be a folder or a file of text, got {root}")
    try:
        matching = sorted(root.glob(pattern))
    except (NotImplementedError, ValueError) as error:
        raise DataError(f"--glob must be a pattern of paths below the folder, got {pattern!r}: {error}") from error
    found = [path for path in matching if path.is_file() and "site-packages" not in path.relative_to(root).parts]
    if pattern == TEXT:
        found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    if not found:
        raise DataError(f"--glob must match at least one file in {root}, got {pattern!r}")
    return root, found


def is_held_out(name: str) -> bool:
    """One file in twenty, chosen by its name: adding or removing other files does not change the choice."""
    return hashlib.sha256(os.fsencode(name)).digest()[0] * 20 < 256


def load_documents(data: Path | None, pattern: str | None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Training and held-out documents, each START followed by a file's bytes.

    Where the names leave one of the two empty, as for a single file, the last twentieth of each file is held out.
    Without a pattern, a folder's text files are read, and the standard library's Python files.
    """
    pattern = pattern or (PYTHON if data is None else TEXT)
    root, paths = find_files(data, pattern)
    only_text = pattern == TEXT and paths != [data]
    files: dict[str, bytes] = {}
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"--data holds a file that cannot be read: {error}") from error
        if content and not (only_text and b"\0" in content):
            files[path.relative_to(root).as_posix()] = content
    held_out = [content for name, content in files.items() if is_held_out(name)]
    train = [content for name, content in files.items() if not is_held_out(name)]
    if not train or not held_out:
        ends = [len(content) - max(1, len(content) // 20) for content in files.values()]
        train = [content[:end] for content, end in zip(files.values(), ends, strict=True) if end]
        held_out = [content[end:] for content, end in zip(files.values(), ends, strict=True) if end]
    if not train:
        raise DataError(
            f"--data must hold text to train on and to hold out, got {len(files)} files with text in {root}"
            + (", where files with a NUL byte are no text" if only_text else "")
        )
    return [_document(content) for content in train], [_document(content) for content in held_out]


def _document(content: bytes) -> np.ndarray:
    return np.concatenate([[START], np.frombuffer(content, np.uint8)]).astype(np.int16)


def digest(documents: list[np.ndarray]) -> str:
    """A digest of all documents in order: a resumed run must find the same one."""
    found = hashlib.sha256()
    for document in documents:
        found.update(len(document).to_bytes(8))
        found.update(document.tobytes())
    return found.hexdigest()


def split(documents: list[np.ndarray], row: int) -> list[Chunk]:
    """Every target of every document once, in chunks of at most a row."""
    return [
        Chunk(i, start, min(row, len(document) - 1 - start))
        for i, document in enumerate(documents)
        for start in range(0, len(document) - 1, row)
    ]


def pack(chunks: list[Chunk], row: int) -> list[list[Chunk]]:
    """Best fit, longest first: each chunk goes to the fullest row that still holds it; no chunk is cropped."""
    return [[chunks[i] for i in found] for found in best_fit([chunk.length for chunk in chunks], row)]


class PackedRows:
    """Packed documents; ``batch`` returns any of their rows."""

    def __init__(self, documents: list[np.ndarray], row: int):
        self.documents, self.row = documents, row
        self.rows = pack(split(documents, row), row)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: list[int]) -> Batch:
        shape = (len(indices), self.row)
        tokens, targets = np.full(shape, START, np.int64), np.full(shape, IGNORED, np.int64)
        positions, doc_ids = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
        counts = np.zeros(len(indices), np.int64)
        for b, index in enumerate(indices):
            at = 0
            for number, chunk in enumerate(self.rows[index]):
                span = slice(at, at + chunk.length)
                source = self.documents[chunk.document][chunk.start : chunk.start + chunk.length + 1]
                tokens[b, span], targets[b, span] = source[:-1], source[1:]
                positions[b, span], doc_ids[b, span] = np.arange(chunk.length), number
                at += chunk.length
            counts[b] = at
        return Batch(*map(torch.from_numpy, (tokens, targets, positions, doc_ids, counts)))

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The row order of an epoch: it depends on seed and epoch alone, so that a resumed run continues it."""
        return np.random.default_rng([seed, epoch]).permutation(len(self))

    def indices(self, step: int, rows: int, seed: int) -> list[int]:
        """The rows of a step; an epoch's last incomplete batch is completed from the next epoch."""
        found = []
        for position in range(step * rows, (step + 1) * rows):
            epoch, offset = divmod(position, len(self))
            found.append(int(self._cached_order(seed, epoch)[offset]))
        return found

    def at_step(self, step: int, rows: int, seed: int) -> Batch:
        """The batch of a step."""
        return self.batch(self.indices(step, rows, seed))

    def _cached_order(self, seed: int, epoch: int) -> np.ndarray:
        if getattr(self, "_order_key", None) != (seed, epoch):
            self._order_key, self._order = (seed, epoch), self.order(seed, epoch)
        return self._order


def unigram_bits_per_byte(train: list[np.ndarray], batches: list[Batch]) -> float:
    """A baseline without a model: every byte costs -log2 of its (add-one) frequency in the training files."""
    counts = np.ones(256)
    for document in train:
        counts += np.bincount(document[1:], minlength=256)
    bits = -np.log2(counts / counts.sum())
    targets = np.concatenate([b.targets.numpy()[b.targets.numpy() != IGNORED] for b in batches])
    return float(bits[targets].mean())

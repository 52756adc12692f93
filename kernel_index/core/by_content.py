"""The order of documents by their content: whoever sorts them so gets the same order from every batch."""

import torch
from torch import Tensor


def documents_by_content(document: Tensor, *words: Tensor) -> tuple[Tensor, Tensor]:
    """Sort documents by a hash of 64 bits of their words.

    Args:
        document: int64 [N], which document a token belongs to; its tokens keep their order.
        words: int64 [N] each, what tells tokens apart.

    Returns:
        The tokens' places in the arguments, document by document, and the number of each one's document, both [N].
        Documents that are alike follow each other as they came.

    >>> import torch
    >>> tokens = torch.tensor([5, 6, 7, 8])
    >>> one = documents_by_content(torch.tensor([0, 0, 1, 1]), tokens)[0]
    >>> other = documents_by_content(torch.tensor([1, 1, 0, 0]), tokens)[0]
    >>> torch.equal(one, other)
    True
    """
    _, document, counts = document.unique(return_inverse=True, return_counts=True)
    by_document = document.argsort(stable=True)
    document = document[by_document]
    offset = torch.arange(len(document), device=document.device) - (counts.cumsum(0) - counts)[document]
    hashes = hashed(offset, *(word[by_document] for word in words))
    number = ranks(torch.zeros_like(counts).index_add_(0, document, hashes))[document]
    order = number.argsort(stable=True)
    return by_document[order], number[order]


def scattered(values: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """Values [N, …] at their places in rows of a shape, [*shape, …]; 0 where nothing stands."""
    flat = values.new_zeros(shape.numel(), *values.shape[1:])
    return flat.index_copy(0, places, values).reshape(*shape, *values.shape[1:])


def ranks(keys: Tensor) -> Tensor:
    """The place of each key [N] among all of them, sorted."""
    return inverse(keys.argsort(stable=True))


def inverse(order: Tensor) -> Tensor:
    """The permutation [N] that undoes a permutation."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def hashed(*words: Tensor) -> Tensor:
    """64 bits of whole numbers, int64, element by element.

    Source: S. Vigna's splitmix64, its two multiplications; integer products wrap around.
    """
    found = torch.zeros_like(words[0])
    for word in words:
        found = found + word + _signed(0x9E3779B97F4A7C15)
        found = (found ^ _shifted(found, 30)) * _signed(0xBF58476D1CE4E5B9)
        found = (found ^ _shifted(found, 27)) * _signed(0x94D049BB133111EB)
        found = found ^ _shifted(found, 31)
    return found


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, without copies of the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits

"""``exact_mask_key``: the static part of a mask, as a key for compiled kernels."""

from collections.abc import Mapping
from typing import Any

from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.masks.exact_mask_contract_cache import contract as rules
from kernel_index.masks.exact_mask_contract_cache.key import ExactMaskKey, versions_for
from kernel_index.masks.prefix_tree.contract import check_tree_mask


def exact_mask_key(
    contract: MaskContract | Mapping[str, Any],
    *,
    local_window: int | None = None,
    block_sizes: int | tuple[int, int] | None = None,
    dtype: Any = None,
    backend: str | None = None,
) -> ExactMaskKey:
    """The static part of a mask, for which a kernel may be compiled; nothing that changes with the batch.

    Two masks have the same key exactly if they agree in causality, window bounds (all forms of "unlimited" are equal),
    which kinds of metadata exist, slot size, block sizes, dtype, backend and versions.  The key does not depend on the
    documents, the numbers of valid tokens, the lengths of the rows or the addresses of the tensors.

    Args:
        contract: a ``MaskContract``, or a mapping with some of the fields ``causal``, ``window``, ``local_window``,
            ``doc_ids``, ``validity``, ``q_offset``, ``key_validity``, ``prefix``, ``subtree_end``, ``positions``,
            ``cu_seqlens`` (or ``has_doc_ids``, ``has_valid_counts``, ``has_q_offset`` and so on where only their
            presence is known), ``valid_token_counts`` and ``valid_slot_counts`` instead of a validity,
            ``base_block_tokens``, ``block_sizes``, ``dtype`` and ``backend``.  A field that is missing or None is
            absent; a zero is present.
        local_window: previous tokens that a sparse kernel attends to besides the selected ones; None for none.
        block_sizes: ``(q_block, kv_block)`` of the kernel, or one size for both.
        dtype: torch's, NumPy's or JAX's dtype of the tensors, or its name.
        backend: name of the backend that compiles; ``"auto"`` by default.  A keyword replaces the mapping's field.

    Returns:
        An ``ExactMaskKey``, a tuple with named fields; ``rebuild`` makes a mask from it for another batch.

    Raises:
        TypeError: ``contract`` is neither a contract nor a mapping, or a field has the wrong type.
        ValueError: an unknown field, or fields that contradict each other.

    Source: the rule of the FlashAttention and FlexAttention compilation keys, with their tensors left out.

    >>> import torch, kernel_index as ki
    >>> a = ki.MaskContract(window=(-1, 0), doc_ids=torch.tensor([[0, 0, 1]]))
    >>> b = ki.MaskContract(window=None, doc_ids=torch.tensor([[4, 5, 5, 5], [1, 1, 1, 1]]))
    >>> ki.exact_mask_key(a) == ki.exact_mask_key(b) == ki.exact_mask_key({"has_doc_ids": True})
    True
    >>> ki.exact_mask_key(a).has_doc_ids, ki.exact_mask_key(ki.MaskContract()).has_doc_ids
    (True, False)
    """
    given = {"local_window": local_window, "block_sizes": block_sizes, "dtype": dtype, "backend": backend}
    fields = rules.fields_of(contract, given)
    causal, window = rules.causal_and_window(fields)
    has_counts = rules.presence(fields, "validity")
    name = rules.backend_name(fields.get("backend") or "auto")
    kinds = {flag: rules.presence(fields, field) for field, flag in rules.PRESENCE.items() if field != "validity"}
    if kinds["has_subtree_end"] or kinds["has_positions"]:
        check_tree_mask(causal, kinds["has_prefix"])
    return ExactMaskKey(
        causal=causal,
        window=window,
        local_window=rules.local_window(fields.get("local_window")),
        has_valid_counts=has_counts,
        slot_tokens=rules.slot_tokens(fields, has_counts),
        **kinds,
        has_two_cu_seqlens=rules.two_lists(fields, kinds["has_cu_seqlens"]),
        block_sizes=rules.block_sizes(fields.get("block_sizes")),
        dtype=rules.dtype_name(fields.get("dtype")),
        backend=name,
        versions=versions_for(name),
    )

"""The shapes that each function's documentation promises to take, written down once more, apart from its contract.

A call that ran although its shapes are not these broadcast something in silence.
"""

from typing import Any

from torch import Tensor

SHAPES: dict[str, dict[str, str]] = {
    "fused_residual_add_rms_norm": {"residual": "... C", "delta": "... C", "weight": "C"},
    "fused_bias_dropout_add": {"x": "... C", "residual": "... C", "bias": "C"},
    "fused_rope_qk": {
        "q": "B T H D",
        "k": "B T K D",
        "cos": "B|1 T 1 R",
        "sin": "B|1 T 1 R",
        "q_weight": "D",
        "k_weight": "D",
    },
    "fused_gated_activation": {"gate": "...", "up": "..."},
    "fused_linear_cross_entropy": {"hidden": "... C", "weight": "V C", "targets": "...", "bias": "V"},
    "fused_linear_cross_entropy_with_lse": {"hidden": "... C", "weight": "V C", "targets": "...", "bias": "V"},
    "token_stats": {"hidden": "... C", "weight": "V C", "targets": "...", "bias": "V"},
    "token_log_probs": {"hidden": "... C", "weight": "V C", "targets": "...", "bias": "V"},
    "attention": {"q": "B T H D", "k": "B S K D", "v": "B S K E", "sink": "H"},
    "attention_with_lse": {"q": "B T H D", "k": "B S K D", "v": "B S K E", "sink": "H"},
    "fa4_kvcache_decode": {"q": "B T H D", "k": "B N K D", "v": "B N K D"},
    "fused_mla_projection": {"x": "... I", "w_down": "L I", "w_up": "O L", "norm_weight": "L"},
    "gather_rows": {"src": "N H D", "idx": "R"},
    "gather_rows_pair": {"a": "N H D", "b": "N H E", "idx": "R"},
    "mhc_branch_input": {"hidden": "... 4 C"},
    "mhc_merge": {"hidden": "... 4 C", "branch_out": "... C"},
    "mhc_merge_and_branch_input": {"hidden": "... 4 C", "branch_out": "... C"},
    "block_sparse_attention": {"q": "B T H D", "k": "B S K D", "v": "B S K E", "sink": "H"},
    "moba_attention": {"q": "B T H D", "k": "B S K D", "v": "B S K E", "sink": "H"},
    "moba_attention_with_lse": {"q": "B T H D", "k": "B S K D", "v": "B S K E", "sink": "H"},
    "exact_token_attention": {"q": "B T H D", "k": "B S K D", "v": "B S K E", "sink": "H"},
    "exact_token_attention_with_lse": {"q": "B T H D", "k": "B S K D", "v": "B S K E", "sink": "H"},
    "ssd_scan": {
        "x": "B T H P",
        "dt": "B T H",
        "a": "H",
        "b": "B T G N",
        "c": "B T G N",
        "d": "H",
        "dt_bias": "H",
        "segments": "B|1 T",
        "state": "B H P N",
    },
    "expert_route": {"x": "N C", "weight": "E C", "bias": "E"},
    "expert_plan": {"experts": "N K"},
    "expert_dispatch": {"x": "N C", "slots": "N K"},
    "expert_combine": {"weights": "N K", "slots": "N K", "base": "N C", "rows": "S C"},
    "gated_rms_norm": {"x": "... C", "gate": "... C", "weight": "C"},
    "causal_conv1d": {"x": "B T C", "weight": "C W", "bias": "C", "segments": "B|1 T"},
    "lightning_indexer": {"q_idx": "B T J D", "k_idx": "B S D", "weights": "B T J"},
}


def misfit(op: str, kwargs: dict[str, Any]) -> str | None:
    """The first argument whose shape is none of the promised ones, or None."""
    known: dict[str, Any] = {}
    patterns = SHAPES.get(op, {})
    if op == "fused_bias_dropout_add" and kwargs.get("bias") is None:
        patterns = {"x": "...", "residual": "..."}  # without a bias there are no channels
    for name, pattern in patterns.items():
        value = kwargs.get(name)
        if isinstance(value, Tensor) and not _fits(tuple(value.shape), pattern.split(), known):
            return f"{name} of shape {tuple(value.shape)} where {pattern!r} is promised with {known}"
    return None


def _fits(shape: tuple[int, ...], pattern: list[str], known: dict[str, Any]) -> bool:
    if pattern[0] == "...":
        rest = len(pattern) - 1
        if len(shape) < rest:
            return False
        lead = shape[: len(shape) - rest]
        return known.setdefault("...", lead) == lead and _fits_all(shape[len(lead) :], pattern[1:], known)
    return _fits_all(shape, pattern, known)


def _fits_all(shape: tuple[int, ...], pattern: list[str], known: dict[str, Any]) -> bool:
    return len(shape) == len(pattern) and all(map(lambda n, p: _is(n, p, known), shape, pattern))


def _is(size: int, symbol: str, known: dict[str, Any]) -> bool:
    if "|" in symbol:
        return any(_is(size, one, known) for one in symbol.split("|"))
    if symbol.isdigit():
        return size == int(symbol) or (symbol == "4")  # other numbers of streams go to the reference
    return known.setdefault(symbol, size) == size

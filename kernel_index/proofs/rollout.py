"""Accepts or refuses the receipt of ``kernel-index rollout-check``."""

from collections.abc import Iterator
from typing import Any

AXES = (
    "batch size",
    "order of rows",
    "packed or alone",
    "thread count",
    "activation checkpointing",
    "compile on or off",
    "prefix tree",
    "cached decoding",
    "chunked prefill",
    "page size",
    "page order",
    "prefix reuse",
    "recomputation after eviction",
)
"""What a receipt must have compared."""

VERSIONS = ("kernel-index", "python", "torch")


def problems(receipt: dict[str, Any]) -> list[str]:
    """Why it proves nothing; empty for one that shows equal bits on every axis, for every letter."""
    try:
        return list(_problems(receipt))
    except (KeyError, TypeError, AttributeError) as error:
        return [f"is not as rollout-check writes it: {type(error).__name__}: {error}"]


def _problems(receipt: dict[str, Any]) -> Iterator[str]:
    if receipt["exact"] is not True:
        yield "does not say that all bits are equal"
    for name in VERSIONS:
        if not receipt["machine"].get(name):
            yield f"does not tell the version of {name}"
    pattern, findings = receipt["model"]["pattern"], receipt["findings"]
    for name in {pattern, *pattern} if len(set(pattern)) > 1 else set(pattern):
        if name not in findings:
            yield f"{name}: was not checked"
    for name, axes in findings.items():
        for axis in AXES:
            yield from (f"{name}, {axis}: {problem}" for problem in _of_axis(axes.get(axis)))
    if not receipt["recipes"].get("attention") and set(pattern) & set("AL"):
        yield "does not tell the recipe of attention"


def _of_axis(finding: dict[str, Any] | None) -> Iterator[str]:
    if finding is None:
        yield "was not compared"
    elif finding["refused"]:
        yield f"refused: {finding['refused']}"
    elif not finding["compared"] > 0:
        yield "nothing was compared"
    elif finding["differing"] != 0 or finding["largest"] != 0:
        yield f"{finding['differing']} of {finding['compared']} values have other bits"

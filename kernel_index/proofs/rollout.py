"""Accepts or refuses the receipt of ``kernel-index rollout-check``."""

from collections.abc import Iterator
from typing import Any

from kernel_index import __version__
from kernel_index.core.digest import digest_problems
from kernel_index.core.testing import suites

AXES = (
    "batch size",
    "order of rows",
    "packed or alone",
    "thread count",
    "gradients",
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

FACTS = {"machine": ("kernel-index", "python", "torch", "isa"), "request": ("device", "tokens", "dtype", "compiler")}
"""What a receipt must tell, by the part of it that does."""

SELECTED = ("moba_attention", "clustered_sparse_attention", "exact_token_attention", "attention")
RECIPES = {"A": ("attention",), "L": ("attention",), "S": SELECTED, "E": ("grouped_product",)}
"""Functions one of whose recipes a receipt must tell, by the letter of the pattern.  On a CPU the scan of M is none."""


def problems(receipt: dict[str, Any]) -> list[str]:
    """Why it proves nothing; empty for one that shows equal bits on every axis, for every letter."""
    try:
        return digest_problems(receipt) + list(_problems(receipt))
    except (KeyError, TypeError, AttributeError) as error:
        return [f"is not as rollout-check writes it: {type(error).__name__}: {error}"]


def _problems(receipt: dict[str, Any]) -> Iterator[str]:
    if receipt["exact"] is not True:
        yield "does not say that all bits are equal"
    for part, names in FACTS.items():
        yield from (f"does not tell {name} of the {part}" for name in names if not receipt[part].get(name))
    pattern, findings, tokens = receipt["model"]["pattern"], receipt["findings"], receipt["request"]["tokens"]
    if not isinstance(pattern, str) or not pattern:
        yield f"names no layer of the model, got {pattern!r}"
        return
    if receipt["request"]["compiler"] == "eager":
        yield "compile on or off: the compiler 'eager' compiles nothing"
    for name in {pattern, *pattern} if len(set(pattern)) > 1 else set(pattern):
        if name not in findings:
            yield f"{name}: was not checked"
    for name, axes in findings.items():
        for axis in AXES:
            yield from (f"{name}, {axis}: {problem}" for problem in _of_axis(axes.get(axis), tokens))
    yield from _of_recipes(receipt["recipes"], pattern, receipt["machine"]["kernel-index"])


def _of_recipes(recipes: dict[str, str], pattern: str, version: str) -> Iterator[str]:
    needed = {("linear",), ("token_log_probs",)} | {names for letter, names in RECIPES.items() if letter in pattern}
    for names in sorted(needed):
        if not any(recipes.get(name) for name in names):
            yield f"does not tell the recipe of {' or '.join(names)}"
    if version == __version__:  # of another version's recipes nothing is known here
        known = {b.invariant.hash for suite in suites() for b in suite.backends if b.invariant}
        yield from (
            f"{op}: {recipe!r} is no recipe of this version" for op, recipe in recipes.items() if recipe not in known
        )


def _of_axis(finding: dict[str, Any] | None, tokens: int) -> Iterator[str]:
    if finding is None:
        yield "was not compared"
    elif finding["refused"] != "":
        yield f"refused: {finding['refused']}"
    elif not finding["compared"] > 0:
        yield "nothing was compared"
    elif 2 * finding["compared"] < tokens:  # a sequence of two tokens has one log-probability
        yield f"{finding['compared']} values are not the log-probabilities of {tokens} tokens"
    elif finding["differing"] != 0 or finding["largest"] != 0:
        yield f"{finding['differing']} of {finding['compared']} values have other bits"

"""The index itself: its entries, by family, and what this tree says about each.

Only names and prose are written down here.  Whether an entry is implemented, which backends it has and by which rules
they decline is read from the entry's folder, so it cannot go stale.  Importing this module imports no kernel.
"""

import ast
import functools
import importlib
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from kernel_index.core.target import machine_why_not

ROOT = Path(__file__).parent.parent
JAX_TABLES = {
    "dense_attention": "kernel_index.jax.attention_backends",
    "clustered_sparse_three_phase": "kernel_index.jax.clustered_backends",
}
"""Entries with backends for JAX arrays -> the module that lists them."""

FAMILIES = (
    "Attention",
    "Sparse staging",
    "Block boundary",
    "Experts and activations",
    "Multi-stream fusion",
    "MLA",
    "Loss",
)


@dataclass(frozen=True, slots=True)
class BackendState:
    """One backend of an entry: its rules as sentences, and why this machine cannot run it, or None."""

    name: str
    machine: str | None
    rules: tuple[str, ...]
    advice: tuple[str, ...]  # rules that only "auto" obeys


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the index: ``folder`` is relative to the package, ``used_by`` names objects of the package."""

    name: str
    family: str
    folder: str
    functions: tuple[str, ...]
    purpose: str
    used_by: tuple[str, ...]

    @property
    def implemented(self) -> bool:
        """Whether the folder's ``api.py`` has every public function of the entry."""
        return not self.missing()

    def missing(self) -> tuple[str, ...]:
        """The public functions that the tree does not have yet."""
        path = ROOT / self.folder / "api.py"
        if not path.exists():
            return self.functions
        api = self._api()
        return tuple(name for name in self.functions if not callable(getattr(api, name, None)))

    def backends(self) -> tuple[BackendState, ...]:
        """The backends in the order in which ``auto`` tries them; empty for metadata, which has none."""
        if self.missing():
            return ()
        found: dict[str, BackendState] = {}
        for table in itertools.chain.from_iterable(map(_tables, self._modules())):
            for b in table:
                rules = sentences(b.why_not)
                advice = () if b.not_worth is None else sentences(b.not_worth)
                if b.name in found:
                    rules = tuple(dict.fromkeys(found[b.name].rules + rules))
                    advice = tuple(dict.fromkeys(found[b.name].advice + advice))
                found[b.name] = BackendState(b.name, machine_why_not(b.name), rules, advice)
        return tuple(sorted(found.values(), key=lambda b: b.name == "reference"))

    def docstrings(self) -> dict[str, str]:
        """The public functions' contracts, by name."""
        if self.missing():
            return {}
        return {name: inspect.getdoc(getattr(self._api(), name)) or "" for name in self.functions}

    def signatures(self) -> dict[str, str]:
        """The public functions' calls, as they are written."""
        if self.missing():
            return {}
        return {name: _signature(getattr(self._api(), name)) for name in self.functions}

    def users(self) -> dict[str, bool]:
        """Where the entry is meant to be used, and whether this tree already uses it there."""
        return {name: self._is_used_by(name) for name in self.used_by}

    def _is_used_by(self, dotted: str) -> bool:
        """Whether the sub-package defines the name and calls the entry, found in the source without importing it."""
        package, _, name = dotted.rpartition(".")
        own = ROOT / self.folder
        files = (f for f in (ROOT / package).rglob("*.py") if own not in f.parents)
        source = "\n".join(f.read_text() for f in files)
        calls = "|".join(self.functions)
        return bool(re.search(rf"^(class|def) {name}\b", source, re.MULTILINE) and re.search(rf"\b({calls})\(", source))

    def _api(self) -> ModuleType:
        return self._module("api")

    def _modules(self) -> Iterator[ModuleType]:
        """Where the entry's backends are listed; those for JAX arrays are read without importing JAX."""
        yield self._api()
        if self.name in JAX_TABLES:
            yield importlib.import_module(JAX_TABLES[self.name])

    def _module(self, name: str) -> ModuleType:
        return importlib.import_module(".".join(("kernel_index", *Path(self.folder).parts, name)))


def _signature(function: Callable[..., Any]) -> str:
    parameters = [
        p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(function).parameters.values()
    ]
    return f"{function.__name__}{inspect.Signature(parameters)}"


def _tables(api: ModuleType) -> Iterator[tuple[Any, ...]]:
    from kernel_index.core.dispatch import Backend

    for value in vars(api).values():
        if isinstance(value, tuple) and value and all(isinstance(v, Backend) for v in value):
            yield value


def sentences(predicate: Callable[..., Any]) -> tuple[str, ...]:
    """The rules that a predicate, or a predicate that it calls, can answer with: fixed strings, in source order."""
    found: dict[str, None] = {}
    _collect(predicate, found, set())
    return tuple(found)


def _collect(function: Any, found: dict[str, None], seen: set[CodeType]) -> None:
    if isinstance(function, functools.partial):
        for argument in function.args:  # the rule of another op, asked on its behalf
            _collect(argument, found, seen)
        function = function.func
    function = inspect.unwrap(function) if callable(function) else function
    if not isinstance(function, FunctionType) or function.__code__ in seen:
        return
    seen.add(function.__code__)
    if not function.__module__.startswith("kernel_index"):
        return
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    names = inspect.getclosurevars(function)
    scope = {**names.globals, **names.nonlocals}
    for node in ast.walk(tree):
        if isinstance(node, ast.Return | ast.Assign) and node.value is not None:
            for text in _strings(node.value, scope):
                found.setdefault(text)
        elif isinstance(node, ast.Call):
            _collect(_resolve(node.func, scope), found, seen)


def _strings(node: ast.AST, scope: dict[str, Any]) -> Iterator[str]:
    """String constants that may be the value of an expression; what a call or a comparison reads is not."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Name | ast.Attribute):
        value = _resolve(node, scope)
        if isinstance(value, str):
            yield value
    elif isinstance(node, ast.IfExp):
        yield from _strings(node.body, scope)
        yield from _strings(node.orelse, scope)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _strings(value, scope)


def _resolve(node: ast.AST, scope: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return scope.get(node.id)
    if isinstance(node, ast.Attribute):
        value = _resolve(node.value, scope)
        ours = isinstance(value, ModuleType) and value.__name__.startswith("kernel_index")
        return getattr(value, node.attr, None) if ours else None  # torch loads parts of itself when they are named
    return None


def find(name: str) -> Entry | None:
    """The entry of this name, or the one that a public function belongs to."""
    return next((e for e in ENTRIES if name == e.name or name in e.functions), None)


def entry(name: str, family: str, folder: str, functions: str, purpose: str, used_by: str) -> Entry:
    """An ``Entry`` with its lists written as words."""
    return Entry(name, family, folder, tuple(functions.split()), purpose, tuple(used_by.split()))


ENTRIES = (
    entry(
        "attention_validity_prefix",
        "Attention",
        "masks/attention_validity_prefix",
        "attention_validity",
        "Bring counts of valid tokens or slots into one form that keeps absent, zero and present apart.",
        "attention.MaskContract",
    ),
    entry(
        "causal_windowing_predicate",
        "Attention",
        "masks/causal_windowing_predicate",
        "can_score_tile causal_windowing_plan",
        "Tell a scoring loop which key tiles lie wholly in the future, so that it stops there.",
        "nn.SparseAttention",
    ),
    entry(
        "doc_window_mask",
        "Attention",
        "masks/doc_window_mask",
        "doc_window_mask MaskContract",
        "State once who may attend to whom: causality, documents, valid prefixes and local windows.",
        "nn.Attention nn.SparseAttention",
    ),
    entry(
        "exact_token_sparse_telemetry",
        "Attention",
        "kernels/attention/exact_token_sparse",
        "exact_token_attention lightning_indexer",
        "Attend to exactly the picked tokens, and record whether a call stayed sparse or went dense.",
        "nn.SparseAttention",
    ),
    entry(
        "fused_rope_qk",
        "Attention",
        "kernels/attention/fused_rope_qk",
        "fused_rope_qk rope_tables",
        "Rotate queries and keys by position in one launch, under one shape check.",
        "nn.Attention nn.TransformerBlock nn.HybridBlock",
    ),
    entry(
        "dense_fa4_execute_proof",
        "Attention",
        "kernels/attention/dense_fa4_execute_proof",
        "fa4_execute_proof",
        "Run FlashAttention-4 for real, check its numbers and gradients, and keep a receipt that can be verified.",
        "proofs.fa4",
    ),
    entry(
        "dense_fa4_kvcache_decode",
        "Attention",
        "kernels/attention/dense_fa4_kvcache_decode",
        "fa4_kvcache_decode",
        "Append new keys and values to a contiguous or paged cache and attend over what it then holds.",
        "nn.Attention",
    ),
    entry(
        "hierarchical_block_expansion",
        "Sparse staging",
        "routing/hierarchical_block_expansion",
        "hierarchical_block_select",
        "Pick key blocks in two steps: the best coarse groups first, then the best of their children.",
        "nn.SparseAttention",
    ),
    entry(
        "triton_row_gather",
        "Sparse staging",
        "kernels/sparse/row_gather",
        "gather_rows",
        "Gather rows of one (N, H, D) tensor by index.",
        "nn.SparseAttention",
    ),
    entry(
        "triton_row_gather_pair",
        "Sparse staging",
        "kernels/sparse/row_gather",
        "gather_rows_pair",
        "Gather the same rows of keys and of values with one check and one launch.",
        "nn.SparseAttention",
    ),
    entry(
        "moba_block_sparse_decode",
        "Sparse staging",
        "kernels/sparse/moba_block_sparse",
        "moba_attention moba_decode resolve_block_sparse_backend",
        "Route each query to a few key blocks, in training and in decoding, and say which backend served it.",
        "nn.SparseAttention",
    ),
    entry(
        "union_selection_query_mask",
        "Sparse staging",
        "routing/union_selection_query_mask",
        "union_selection materialize_query_union_mask",
        "Join the blocks that a tile of queries picked, and keep for each query which of them are its own.",
        "nn.SparseAttention jax.clustered_sparse_attention",
    ),
    entry(
        "clustered_sparse_three_phase",
        "Sparse staging",
        "kernels/sparse/clustered_sparse_three_phase",
        "clustered_sparse_attention",
        "Score blocks, join the selections of neighbouring queries, attend over the union: three separate phases.",
        "nn.SparseAttention jax.clustered_sparse_attention",
    ),
    entry(
        "exact_mask_contract_cache",
        "Sparse staging",
        "masks/exact_mask_contract_cache",
        "exact_mask_key",
        "Key compiled mask kernels by what is static in a mask, never by the tensors of a batch.",
        "nn.SparseAttention jax.clustered_sparse_attention",
    ),
    entry(
        "fused_bias_dropout_add",
        "Block boundary",
        "kernels/boundary/fused_bias_dropout_add",
        "fused_bias_dropout_add",
        "Add the bias, drop out and add the residual in one pass, with a mask that replays from its seed.",
        "nn.TransformerBlock nn.HybridBlock",
    ),
    entry(
        "fused_residual_add_rms_norm",
        "Block boundary",
        "kernels/boundary/fused_residual_add_rms_norm",
        "fused_residual_add_rms_norm",
        "Update the residual stream and normalise it in one pass over memory.",
        "nn.TransformerBlock nn.HybridBlock",
    ),
    entry(
        "fused_relu_squared",
        "Experts and activations",
        "kernels/experts/fused_relu_squared",
        "fused_relu_squared",
        "Squared ReLU with its gradient, each in one pass over memory.",
        "nn.SquaredReLUMLP nn.Experts",
    ),
    entry(
        "mhc_fused_static",
        "Multi-stream fusion",
        "kernels/streams/mhc_fused_static",
        "mhc_branch_input mhc_merge mhc_merge_and_branch_input sinkhorn",
        "Mix four residual streams with static coefficients, a merge fused with the next layer's input.",
        "nn.HyperConnections",
    ),
    entry(
        "fused_mla_projection",
        "MLA",
        "kernels/mla/fused_mla_projection",
        "fused_mla_projection",
        "Project down, normalise and project up, recomputing the latent in backward instead of keeping it.",
        "nn.MLA",
    ),
    entry(
        "fused_linear_cross_entropy_chunked",
        "Loss",
        "kernels/loss/fused_linear_cross_entropy_chunked",
        "fused_linear_cross_entropy token_log_probs",
        "Classify over a large vocabulary without ever holding more than a chunk of the logits.",
        "lm.LanguageModel",
    ),
)
"""The 20 entries of the seed in its own order, and behind them what `kernel-index new` added."""

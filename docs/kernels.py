"""A page for each kernel: contract, what was seen, rules, mathematics."""

from collections.abc import Iterable
from pathlib import Path

from docs import SOURCE, states, text
from docs.place import place
from kernel_index.index.entries import ENTRIES
from kernel_index.index.entry import ROOT, Entry

LIBRARIES = ("masks", "kvcache", "routing")
"""Folders below ``kernels``, whose READMEs may hold sections of any entry."""


TITLES = {
    "dense_attention": (
        "Attention",
        "flash attention, FlashAttention, SDPA, FlexAttention, grouped-query attention, softcap, sink",
    ),
    "dense_fa4_kvcache_decode": ("Decoding with a KV cache", "paged attention, flash decoding, FlashAttention-4"),
    "exact_token_sparse_telemetry": ("Exact-token attention", "lightning indexer, sparse attention over tokens, top-k"),
    "fused_rope_qk": ("RoPE of Q and K", "rotary position embedding, YaRN, QK norm"),
    "doc_window_mask": ("Masks", "causal mask, packed documents, sliding window, padding"),
    "attention_validity_prefix": ("Valid prefixes", "padding, sequence lengths"),
    "causal_windowing_predicate": ("Causal windowing", "which tiles a scoring loop visits"),
    "dense_fa4_execute_proof": ("Proof of FlashAttention-4", "FA4, flash attention"),
    "moba_block_sparse_decode": ("MoBA", "mixture of block attention, block-sparse attention and decoding"),
    "clustered_sparse_three_phase": ("Clustered sparse attention", "block-sparse attention"),
    "selected_decode": ("Decoding over a selection", "sparse decoding"),
    "hierarchical_block_expansion": ("Hierarchical block selection", "routing in two steps"),
    "union_selection_query_mask": ("Union of selections", "blocks that a tile's queries share"),
    "triton_row_gather": ("Row gather", "index_select"),
    "triton_row_gather_pair": ("Paired row gather", "gather of keys and values"),
    "exact_mask_contract_cache": ("Cache of mask kernels", "keys of compiled masks"),
    "fused_residual_add_rms_norm": ("Residual + RMSNorm", "rmsnorm, add and norm, pre-norm block"),
    "fused_bias_dropout_add": ("Bias + dropout + add", "residual dropout"),
    "fused_gated_activation": ("Gated activation", "SwiGLU, GEGLU, ReGLU, SiLU and multiply"),
    "fused_relu_squared": ("Squared ReLU", "relu², ReLU2"),
    "expert_router": ("Expert router", "mixture of experts, MoE, gating, top-k routing"),
    "expert_dispatch": ("Expert dispatch", "mixture of experts, MoE, permute and unpermute, scatter and combine"),
    "expert_mlp": ("Experts", "mixture of experts, MoE, SwiGLU, activation recomputation"),
    "grouped_product": ("Grouped product", "mixture of experts, MoE, grouped GEMM"),
    "mhc_fused_static": ("Hyper-connections", "mHC, residual streams, Sinkhorn"),
    "fused_mla_projection": ("MLA projection", "multi-head latent attention, low-rank projection"),
    "ssd_scan": ("Mamba-2 scan", "state-space model, SSM, SSD, state-space duality, Mamba-2, gated linear recurrence"),
    "causal_conv1d": ("Causal convolution", "causal conv1d, depthwise convolution, short convolution"),
    "gated_rms_norm": ("Gated RMSNorm", "RMSNormGated, SiLU gate and rmsnorm"),
    "fused_linear_cross_entropy_chunked": ("Linear cross-entropy", "fused loss, logits, log probabilities, z-loss"),
}
"""For people: each entry's title, and the words that they may search for; those that most come for first."""


def title(e: Entry) -> str:
    return TITLES.get(e.name, (e.name, ""))[0]


def of_family(family: str) -> list[Entry]:
    """The entries in the order of ``TITLES``; one without a title is the last."""
    order = list(TITLES)
    found = [e for e in ENTRIES if e.family == family]
    return sorted(found, key=lambda e: order.index(e.name) if e.name in TITLES else len(order))


def page(e: Entry) -> str:
    return f"kernels/{e.name}.md"


def operations(e: Entry, seen: Iterable[states.State]) -> dict[str, list[str]]:
    """The entry's functions, and the backends of each: none for metadata and plain functions."""
    tables = {name: [b.name for b in table] for names, table in e.tables().items() for name in names}
    return {
        op: list(dict.fromkeys([*tables.get(op, ()), *(s.backend for s in seen if s.op == op)])) for op in e.functions
    }


def write(e: Entry, seen: list[states.State]) -> str:
    """The page as Markdown; mkdocstrings fills in signatures and docstrings."""
    known = TITLES.get(e.name, ("", ""))[1]
    parts = [f"# {title(e)}\n", f"{e.purpose}\n"]
    parts += [f"Also known as: {known}.\n"] * bool(known)
    parts.append(f"{e.family} · [`kernel_index/{e.folder}`]({SOURCE}/tree/main/kernel_index/{e.folder}) · {e.name}\n")
    if not e.implemented:
        parts.append(f"Not implemented yet: {', '.join(f'`{name}`' for name in e.missing())}.\n")
    parts += [f"::: kernel_index.{name}\n" for name in e.docstrings()]
    parts += [_evidence(e, seen), _rules(e), _family_readme(e)]
    users = [f"- `kernel_index.{name}`{'' if present else ' (not yet)'}" for name, present in e.users().items()]
    parts += ["## Where it is used\n", "\n".join(users) + "\n"]
    return "\n".join(part for part in parts if part)


def _evidence(e: Entry, seen: list[states.State]) -> str:
    rows = [
        [
            f"`{s.op}`",
            s.backend,
            str(s),
            s.where,
            str(s.passed),
            str(s.failed),
            s.versions,
            f"[{s.source}](../results/{s.source})",
        ]
        for s in seen
        if s.op in e.functions
    ]
    if not rows:
        return "## What was seen\n\nNo proof or benchmark of it is recorded.\n"
    head = ["function", "backend", "state", "where", "passed", "failed", "versions and date", "record"]
    said = [f"- {text.prose(note)}\n" for note in states.notes(e.functions)]
    return "\n".join(["## What was seen\n", text.table(head, rows), *said])


def _rules(e: Entry) -> str:
    tables = e.tables()
    if not tables:
        return ""
    lines = ['## Backends and their rules\n\nIn the order in which `backend="auto"` tries them.\n']
    for names, table in tables.items():
        if len(tables) > 1:
            lines.append(f"### {', '.join(f'`{name}`' for name in names)}\n")
        for b in table:
            lines.append(f"**{b.name}**\n")
            lines += [f"- declines: {text.prose(rule)}" for rule in b.rules]
            lines += [f"- `auto` passes over it: {text.prose(rule)}" for rule in b.advice]
            lines.append("- runs every legal call\n" if not b.rules + b.advice else "")
    return "\n".join(lines)


def _family_readme(e: Entry) -> str:
    """The entry's sections of the READMEs; of the README above its folder also those that belong to no entry."""
    parent = Path(e.folder).parent.as_posix()
    names = {name for k in ENTRIES for name in _names(k)}
    parts = []
    for folder in dict.fromkeys((parent, *LIBRARIES)):
        legend, found = readme(folder)
        mine = [h for h in found if h in _names(e) or (folder == parent and h not in names)]
        if mine:
            body = "\n\n".join([legend, *(f"### {h}\n\n{text.deeper(found[h])}" for h in mine)])
            parts.append(text.relink(body, f"kernel_index/{folder}/README.md", page(e), place))
    return "\n\n".join(["## Mathematics and memory", *parts]) + "\n" if parts else ""


def readme(folder: str) -> tuple[str, dict[str, str]]:
    """The legend and the sections of a folder's README; empty without one."""
    path = ROOT / folder / "README.md"
    return text.sections(path.read_text()) if path.exists() else ("", {})


def _names(e: Entry) -> set[str]:
    return {e.name, Path(e.folder).name, *e.functions}

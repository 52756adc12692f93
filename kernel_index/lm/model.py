"""The language model: embeddings, blocks by their letters, and a loss that never holds the full logits."""

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.core.by_content import hooked
from kernel_index.core.numerics import is_invariant
from kernel_index.lm.cache import ModelCache
from kernel_index.lm.config import ModelConfig
from kernel_index.lm.data import IGNORED, Batch
from kernel_index.lm.one_order import AnyBatch, InOrder, Ordered, as_given, in_one_order
from kernel_index.lm.trees import TreeBatch, at_sources
from kernel_index.nn import (
    MLA,
    Attention,
    BlockBranch,
    Embedding,
    Experts,
    HybridBlock,
    HyperConnectedBlocks,
    Linear,
    Mamba2,
    Mixer,
    ResidualRMSNorm,
    Router,
    SparseAttention,
    SquaredReLUMLP,
    SwiGLUMLP,
)
from kernel_index.nn.device_scan import remembered_length
from kernel_index.nn.mlp import MLPS
from kernel_index.nn.residual import invariant_norm

Reduction = Literal["mean", "sum", "none"]


def make_block(config: ModelConfig, index: int) -> HybridBlock:
    """The block for a letter of the pattern."""
    c, letter = config, config.pattern[index]
    options: dict[str, Any]
    mixer: Mixer | None = None
    mlp: nn.Module | None = None
    if letter == "A":
        mixer = Attention(c.dim, c.heads, c.kv_heads, c.head_dim, window=c.windows[index])
    elif letter == "L":
        mixer = MLA(c.dim, c.heads, c.head_dim, rope=c.latent.rope, latent=c.latent.latent, fused=c.latent.fused)
    elif letter == "M":
        s = c.state_space
        mixer = Mamba2(c.dim, s.heads, s.head_dim, state=s.state, chunk=s.chunk)
    elif letter == "E":
        e = c.experts
        options = {"shared": e.shared, "activation": c.activation, "scores": e.scores}
        mlp = Experts(c.dim, e.hidden, experts=e.count, topk=e.topk, **options)
    elif letter == "S":
        p = c.sparse
        options = {"block": p.block, "topk": p.topk, "tokens": p.tokens, "index_heads": p.index_heads}
        options |= {"index_dim": p.index_dim, "window": c.windows[index], "kind": c.sparse_kind(index)}
        mixer = SparseAttention(c.dim, c.heads, c.kv_heads, c.head_dim, **options)
        mixer.hierarchy, mixer.report_unions = p.hierarchy, p.report_unions
    if letter in "ASL" and c.hidden:
        mlp = MLPS[c.activation](c.dim, c.hidden)
    return HybridBlock(c.dim, mixer=mixer, mlp=mlp, dropout=c.dropout, fp32_residual=not c.residual.endswith("plain"))


class LanguageModel(nn.Module):
    """A pre-norm decoder; it calls every kernel through its public function."""

    blocks: nn.ModuleList | HyperConnectedBlocks

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = Embedding(config.padded_vocab, config.dim)
        blocks = [make_block(config, i) for i in range(len(config.pattern))]
        self._in_order = tuple(blocks)  # a tuple does not register the blocks twice, and saves a walk for every token
        if config.residual.startswith("mhc"):
            self.blocks = HyperConnectedBlocks(BlockBranch(b) for b in blocks)
        else:
            self.blocks = nn.ModuleList(blocks)
        self.final = ResidualRMSNorm(config.dim)
        self.head = Linear(config.dim, config.padded_vocab, bias=False)
        self.after_next = AfterNext(config) if config.ahead else None
        self.reset_parameters()

    def hybrid_blocks(self) -> tuple[HybridBlock, ...]:
        """The blocks in the order of the pattern."""
        return self._in_order

    def compile_blocks(self, compiler: str = "inductor") -> None:
        """Compile each block's training pass: blocks of one kind share a graph, so it is traced once for them all.

        PyTorch's limit of graphs for one function grows with the blocks, for the whole process.
        """
        settings = torch._dynamo.config
        settings.recompile_limit = max(settings.recompile_limit, 4 * len(self.hybrid_blocks()))
        for block in self.hybrid_blocks():
            block.compile_training(compiler)

    def mixers(self) -> list[Mixer | None]:
        return [block.mixer for block in self._in_order]

    def routers(self) -> list[Router]:
        return [block.mlp.router for block in self._in_order if isinstance(block.mlp, Experts)]

    def attend_densely(self, dense: bool) -> None:
        """Let the S blocks attend to all keys, for a dense warm-up, or to what they select."""
        for mixer in self.mixers():
            if isinstance(mixer, SparseAttention):
                mixer.dense = dense

    def reset_parameters(self) -> None:
        """Normal(1/√fan-in).  The projections that end a branch start at zero, so that step 0 is a bigram model."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
        for block in self.hybrid_blocks():
            for weight in _branch_ends(block):
                nn.init.zeros_(weight)
        nn.init.normal_(self.embed.weight, std=1.0)
        nn.init.zeros_(self.head.weight)

    def hidden(self, batch: AnyBatch) -> Tensor:
        """Final hidden states [B, T, C] of a packed batch, or of one of prefix trees."""
        known = self._in_order_to_train(batch)
        return known.of_tokens(self._hidden(known.batch))

    def _in_order_to_train(self, batch: AnyBatch, summed: bool = False) -> InOrder:
        """Where a sum over tokens must not depend on the packing, the documents in their one order.

        Not where somebody's hooks may look at the caller's rows, nor inside a trace, whose sizes cannot follow content.
        """
        if isinstance(batch, Ordered):
            return as_given(batch)
        ordered = is_invariant() and (summed or torch.is_grad_enabled()) and not torch.compiler.is_compiling()
        return in_one_order(batch) if ordered and hooked(self) is None else as_given(batch)

    def in_order(self, batch: Batch) -> Batch:
        """The batch as a training step takes it, before one is recorded: this reads the device, the step does not."""
        found = self._in_order_to_train(batch, summed=True).batch
        assert isinstance(found, Batch)
        return found

    def _hidden(self, batch: AnyBatch) -> Tensor:
        for router in self.routers():
            router.counted = None if isinstance(batch, TreeBatch) else (batch.doc_ids >= 0).flatten()
        if isinstance(batch, TreeBatch):
            mask = batch.mask
        else:
            counts = ki.attention_validity(valid_token_counts=batch.valid_counts)
            mask = ki.MaskContract(causal=True, doc_ids=batch.doc_ids, validity=counts)
            if isinstance(batch, Ordered):
                remembered_length(mask, batch.doc_ids, lambda: batch.in_chunks)
        masks: dict[int | None, ki.MaskContract] = {}  # layers with the same window share one contract
        for mixer in self.mixers():
            if mixer is not None and mixer.window not in masks:
                masks[mixer.window] = mixer.contract(mask)
        ropes = self._rope_tables(batch.positions)
        own = [(None, None) if m is None else (masks[m.window], ropes.get(m.rope_dim or 0)) for m in self.mixers()]
        return self._run(batch.tokens, own)

    def _rope_tables(self, positions: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        widths = dict.fromkeys(m.rope_dim for m in self.mixers() if m is not None and m.rope_dim is not None)
        return {width: ki.rope_tables(positions, width, self.config.rope_base) for width in widths}

    def _run(self, tokens: Tensor, arguments: list[tuple[Any, ...]], mixing: Tensor | None = None) -> Tensor:
        stream = self.embed(tokens)
        if self.config.residual.endswith("plain") and torch.is_autocast_enabled(stream.device.type):
            stream = stream.to(torch.get_autocast_dtype(stream.device.type))
        branch = None
        if isinstance(self.blocks, HyperConnectedBlocks):
            stream = self.blocks.run(stream, [(own, {}) for own in arguments], mixing)
        else:
            for block, own in zip(self.blocks, arguments, strict=True):
                stream, branch = block(stream, branch, *own)
        return self.final(stream, branch)[1]

    def loss(self, batch: AnyBatch, *, reduction: Reduction = "mean", z_loss: float | None = None) -> Tensor:
        """Cross-entropy in nats per token over the batch's targets (-100 is ignored), or over the edges of its trees.

        In training, with ``config.ahead`` and ``"mean"``, the loss of the token after the next is added.
        """
        known = self._in_order_to_train(batch, summed=reduction != "none")
        loss = self._loss(known.batch, reduction, z_loss)
        return known.of_targets(loss) if reduction == "none" else loss

    def _loss(self, batch: AnyBatch, reduction: Reduction, z_loss: float | None) -> Tensor:
        hidden = self._hidden(batch)
        if isinstance(batch, TreeBatch):
            hidden = at_sources(hidden, batch.sources)
        options: dict[str, Any] = {
            "reduction": reduction,
            "z_loss": self.config.z_loss if z_loss is None else z_loss,
            "valid_vocab": self.config.vocab,
        }
        loss = ki.fused_linear_cross_entropy(hidden, self.head.weight, batch.targets, **options)
        if self.after_next is None or not self.training or reduction != "mean":
            return loss
        if isinstance(batch, TreeBatch):
            first, second = batch.after_next.T
            further = self.after_next(hidden[None, first], self.embed(batch.targets[None, first]))[0]
            targets = batch.targets[second]
        else:
            further = self.after_next(hidden, self.embed(batch.targets.clamp_min(0)))
            targets = after_next_targets(batch)
        return loss + self.config.ahead * ki.fused_linear_cross_entropy(further, self.head.weight, targets, **options)

    def log_probs(self, batch: AnyBatch) -> Tensor:
        """Log-probability of each target [B, T] in float32, 0 where there is none; of a tree batch, of each edge.

        Under ``ki.numerics("invariant")`` they are those of ``lm.generate.rollout``, bit by bit.
        """
        known = self._in_order_to_train(batch)
        hidden = self._hidden(known.batch)
        if isinstance(known.batch, TreeBatch):
            hidden = at_sources(hidden, known.batch.sources)
        return known.of_targets(self.log_probs_of(hidden, known.batch.targets))

    def log_probs_of(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probability of targets [...] after final hidden states [..., C]."""
        return ki.token_log_probs(hidden, self.head.weight, targets, valid_vocab=self.config.vocab)

    def forward(self, batch: AnyBatch) -> Tensor:
        """The training loss: ``torch.compile`` and FSDP wrap this method."""
        return self.loss(batch)

    def next_logits(self, tokens: Tensor) -> Tensor:
        """Logits [V] of the token that follows a prompt [T], T at most the context, without a cache."""
        batch = Batch.of_prompt(tokens, self.config.context)
        batch = Batch(*(t.to(self.head.weight.device) for t in batch))
        return self.logits(self.hidden(batch)[0, tokens.numel() - 1])

    @torch.no_grad()
    def decode(self, tokens: Tensor, start: int | Tensor, cache: ModelCache, counts: Tensor | None = None) -> Tensor:
        """Logits [B, V] of the token after tokens [B, T], the new tokens of the cache's step at positions ``start …``.

        Each row is one document; windows are those of training.  ``start`` may differ from row to row, [B]; where rows
        are padded to one length, ``counts`` [B] says how many of their tokens are real.  The caller begins and advances
        the step.
        """
        hidden = self.cached_hidden(tokens, start, cache)
        if counts is None:
            return self.logits(hidden[:, -1])
        return self.logits(hidden[torch.arange(len(hidden), device=hidden.device), counts - 1])

    @torch.no_grad()  # some caches return keys without a gradient: none at all rather than an incomplete one
    def cached_hidden(self, tokens: Tensor, start: int | Tensor, cache: ModelCache) -> Tensor:
        """Final hidden states [B, T, C] of the new tokens, as ``decode`` has them."""
        cache.check_tokens(tokens)
        new = torch.arange(tokens.shape[1], device=tokens.device)
        at = (start[:, None] if isinstance(start, Tensor) else start) + new[None]
        ropes = self._rope_tables(at)
        rotated = [None if m is None else ropes.get(m.rope_dim or 0) for m in self.mixers()]
        arguments = [(None, tables, cache.layer(i)) for i, tables in enumerate(rotated)]
        return self._run(tokens, arguments, self._mixing(cache))

    def new_cache(self, tokens: int, page_size: int = 16) -> ModelCache:
        """Empty caches for every block, with a capacity of ``tokens`` tokens in all."""
        return ModelCache(self.mixers(), tokens, page_size)

    def _mixing(self, cache: ModelCache) -> Tensor | None:
        """The mixing matrices, computed again whenever a sequence begins: its later steps use those of its prompt."""
        if isinstance(self.blocks, HyperConnectedBlocks) and (cache.mixing is None or 0 in cache.lengths()):
            cache.mixing = self.blocks.mixing()
        return cache.mixing

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] in float32 of final hidden states [..., C]."""
        if is_invariant():
            return ki.linear(hidden.float(), self.head.weight[: self.config.vocab].float())
        return (hidden.float() @ self.head.weight.float().T)[..., : self.config.vocab]

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


class AfterNext(nn.Module):
    """Hidden states for the token after the next, from the hidden states for the next token and its embedding.

    Source: DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, section 2.2, with a feed-forward block.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.join = Linear(2 * config.dim, config.dim, bias=False)
        self.block = HybridBlock(config.dim, mlp=MLPS[config.activation](config.dim, config.hidden or config.dim))
        self.final = ResidualRMSNorm(config.dim)

    def forward(self, hidden_BTC: Tensor, next_BTC: Tensor) -> Tensor:
        if is_invariant():
            known = invariant_norm(next_BTC, torch.ones_like(next_BTC[0, 0]), torch.finfo(next_BTC.dtype).eps)
        else:
            known = nn.functional.rms_norm(next_BTC, next_BTC.shape[-1:])
        stream, branch = self.block(self.join(torch.cat([hidden_BTC, known.to(hidden_BTC.dtype)], -1)), None)
        return self.final(stream, branch)[1]


def after_next_targets(batch: Batch) -> Tensor:
    """The targets shifted by one token; ignored where the next token belongs to another document."""
    same = batch.doc_ids[:, 1:] == batch.doc_ids[:, :-1]
    return nn.functional.pad(torch.where(same, batch.targets[:, 1:], IGNORED), (0, 1), value=IGNORED)


def _branch_ends(block: HybridBlock) -> list[Tensor]:
    ends = [] if block.mixer is None else [block.mixer.out.weight]
    if isinstance(block.mlp, Experts):
        return [*ends, block.mlp.down, *([] if block.mlp.shared is None else [block.mlp.shared.down.weight])]
    return ends if block.mlp is None else [*ends, cast(SquaredReLUMLP | SwiGLUMLP, block.mlp).down.weight]


def flops_per_token(config: ModelConfig) -> float:
    """Training FLOPs per token: 6 per weight of every matmul, and 12·D·H per key that a query may see."""
    c = config
    gated = 3 if c.activation == "swiglu" else 2
    dense = gated * c.dim * c.hidden
    weights, seen = c.dim * c.padded_vocab * (2 if c.ahead else 1), 0.0
    for letter, window in zip(c.pattern, c.windows, strict=True):
        keys = min(window + 1 if window is not None else c.context, c.context / 2)
        if letter in "AS":
            weights += c.dim * c.head_dim * (2 * c.heads + 2 * c.kv_heads) + dense
            seen += 2 * c.head_dim * c.heads * (keys if letter == "A" else min(keys, c.sparse.topk * c.sparse.block))
        elif letter == "L":
            wide, latent = c.heads * c.head_dim, c.latent.latent
            weights += c.dim * (2 * wide + (c.heads + 1) * c.latent.rope + latent) + 2 * latent * wide + dense
            seen += c.heads * (2 * c.head_dim + c.latent.rope) * keys
        elif letter == "M":
            s = c.state_space
            inner = s.heads * s.head_dim
            weights += c.dim * (3 * inner + 2 * s.state + s.heads) + 2 * inner * s.state
            seen += (inner + s.heads * s.state) * min(s.chunk, c.context) / 2
        else:
            weights += c.dim * c.experts.count + gated * c.dim * (c.experts.topk * c.experts.hidden + c.experts.shared)
    if c.ahead:
        weights += 2 * c.dim**2 + gated * c.dim * (c.hidden or c.dim)
    return 6 * (weights + seen)


def active_parameters(model: LanguageModel) -> int:
    """Parameters that one token uses: all but those of the experts that it is not routed to."""
    e = model.config.experts
    idle = sum(
        (m.up.numel() + m.down.numel()) * (e.count - e.topk) // e.count
        for m in model.modules()
        if isinstance(m, Experts)
    )
    return model.parameter_count() - idle

"""The language model: embeddings, blocks, and a loss that never holds the full logits."""

import math

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.lm.config import ModelConfig
from kernel_index.lm.data import Batch
from kernel_index.nn import Attention, ResidualRMSNorm, SquaredReLUMLP, TransformerBlock


class LanguageModel(nn.Module):
    """Pre-norm decoder over bytes; every fused op is called through its public function."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        c = config
        self.embed = nn.Embedding(c.padded_vocab, c.dim)
        blocks = [
            TransformerBlock(
                Attention(c.dim, c.heads, c.kv_heads, c.head_dim, window=window),
                SquaredReLUMLP(c.dim, c.hidden),
                c.dim,
                dropout=c.dropout,
            )
            for _, window in zip(c.pattern, c.windows, strict=True)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.final = ResidualRMSNorm(c.dim)
        self.head = nn.Linear(c.dim, c.padded_vocab, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal(1/√fan-in); the projections that end a branch start at zero, so that step 0 is a bigram model."""
        branch_ends: list[Tensor] = []
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
            if isinstance(module, TransformerBlock):
                branch_ends += [module.mixer.out.weight, module.mlp.down.weight]
        for weight in branch_ends:
            nn.init.zeros_(weight)
        nn.init.normal_(self.embed.weight, std=1.0)
        nn.init.zeros_(self.head.weight)

    def hidden(self, batch: Batch) -> Tensor:
        """Final hidden states [B, T, C] of a packed batch."""
        mask = ki.MaskContract(
            causal=True, doc_ids=batch.doc_ids, validity=ki.attention_validity(valid_token_counts=batch.valid_counts)
        )
        masks: dict[int | None, ki.MaskContract] = {}  # layers with the same window share one contract
        rope = ki.rope_tables(batch.positions, self.config.head_dim, self.config.rope_base)
        stream, branch = self.embed(batch.tokens), None
        for block in self.blocks:
            assert isinstance(block, TransformerBlock)
            window = block.mixer.window
            if window not in masks:
                masks[window] = block.mixer.contract(mask)
            stream, branch = block(stream, branch, masks[window], rope)
        return self.final(stream, branch)[1]

    def loss(self, batch: Batch, *, reduction: str = "mean", z_loss: float | None = None) -> Tensor:
        """Cross-entropy in nats per byte over the batch's targets (-100 is ignored)."""
        return ki.fused_linear_cross_entropy(
            self.hidden(batch),
            self.head.weight,
            batch.targets,
            reduction=reduction,
            z_loss=self.config.z_loss if z_loss is None else z_loss,
            valid_vocab=self.config.vocab,
        )

    def next_logits(self, tokens: Tensor) -> Tensor:
        """Logits [V] of the token that follows a prompt [T], T at most the context; everything is computed anew."""
        hidden = self.hidden(Batch.of_prompt(tokens, self.config.context))[0, tokens.numel() - 1]
        return self._logits(hidden)

    def decode(self, tokens: Tensor, start: int, cache: "ki.PagedKVCache") -> Tensor:
        """Logits [B, V] of what follows tokens [B, T] at positions ``start …``, the new ones of the cache's step.

        Each row is one document; windows are those of training.  The caller begins and advances the step.
        """
        at = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
        rope = ki.rope_tables(at, self.config.head_dim, self.config.rope_base)
        stream, branch = self.embed(tokens), None
        for index, block in enumerate(self.blocks):
            stream, branch = block(stream, branch, None, rope, cache.layer(index))
        return self._logits(self.final(stream, branch)[1][:, -1])

    def new_cache(self, tokens: int, page_size: int = 16) -> "ki.PagedKVCache":
        """An empty paged cache with room for so many tokens in all."""
        c, weight = self.config, self.head.weight
        pages = -(-tokens // page_size)
        return ki.PagedKVCache(
            len(c.pattern), pages, page_size, c.kv_heads, c.head_dim, dtype=weight.dtype, device=weight.device
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        return (hidden.float() @ self.head.weight.float().T)[..., : self.config.vocab]

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


def flops_per_token(config: ModelConfig) -> float:
    """Training FLOPs per token: 6 per weight of every matmul, and 12·D·H per key that a query may see."""
    c = config
    per_block = c.dim * c.head_dim * (2 * c.heads + 2 * c.kv_heads) + 2 * c.dim * c.hidden
    seen = sum(min(w + 1 if w is not None else c.context, c.context / 2) for w in c.windows)
    return 6 * (len(c.pattern) * per_block + c.dim * c.padded_vocab) + 12 * c.head_dim * c.heads * seen

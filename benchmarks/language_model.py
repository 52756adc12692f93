"""What do the kernels bring to a whole training step, a sparse block to a long row, and the caches to generation?

Training steps, forward + backward, kernels against ``KERNEL_INDEX_BACKEND=reference`` in eager mode: the model of
``make train`` on 4 rows of 512, and four blocks of attention on one row of 4096 tokens of 8 documents with a vocabulary
of 32768.  One block at T = 32768: sparse (clustered, 16 blocks of 64) against full attention.  Generation: 16 tokens
after 2048 through the caches, against computing everything anew for each; a token by itself would find the CPU's
caches emptied by the other contender, which no token of a text does.

Targets, as times of ours ÷ theirs: 1.0, 1/1.5 at half the memory, 1/2.5, 1/20.

Predicted: the large vocabulary is 32768 · 256 · 4096 products and 512 MB of float32 logits that the plain path keeps
several times; documents leave an eighth of the scores.  A sparse block at 32768 does a sixteenth of the scores at half
the rate, beside projections that stay: 3 to 4 times faster.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.harness import Comparison, Contender, compare
from kernel_index.lm.config import PRESETS, ModelConfig, Sparse
from kernel_index.lm.data import Batch
from kernel_index.lm.model import LanguageModel
from kernel_index.lm.train import forced_backend

OPS = (
    "attention",
    "clustered_sparse_attention",
    "fa4_kvcache_decode",
    "fused_bias_dropout_add",
    "fused_linear_cross_entropy",
    "fused_residual_add_rms_norm",
    "fused_relu_squared",
    "fused_rope_qk",
)  # what the models call

TOKENS = 16
"""Of a call that generates."""

TINY = PRESETS["tiny"].model
LONG = ModelConfig(
    pattern="AAAA", windows=(None,) * 4, dim=256, heads=4, kv_heads=2, head_dim=64, hidden=1024, context=4096,
    vocab=32768, padded_vocab=32768,
)  # fmt: skip
BLOCK = replace(LONG, pattern="A", windows=(None,), context=32768, hidden=512, vocab=257, padded_vocab=320)
SPARSE = replace(BLOCK, pattern="S", sparse=Sparse(("clustered",), block=64, topk=16))


def packed(config: ModelConfig, rows: int, documents: int) -> Batch:
    torch.manual_seed(0)
    shape, at = (rows, config.context), torch.arange(config.context)
    tokens = torch.randint(0, config.vocab, shape)
    size = config.context // documents
    positions, ids = ((x).expand(shape).contiguous() for x in (at % size, at // size))
    return Batch(tokens, tokens.roll(-1, 1), positions, ids, torch.full((rows,), config.context))


def step(config: ModelConfig, rows: int, documents: int, backend: str) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        model, batch = LanguageModel(config), packed(config, rows, documents)
        with torch.no_grad():
            model.head.weight.normal_()

        def call() -> None:
            with forced_backend(backend):
                model.loss(batch).backward()
            model.zero_grad()

        return call

    return prepare


def next_tokens(use_cache: bool) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        model = LanguageModel(replace(TINY, context=2049)).eval()
        tokens = torch.randint(0, 256, (1, 2049))
        if not use_cache:
            return lambda: [model.next_logits(tokens[0]) for _ in range(TOKENS)]
        cache = model.new_cache(2064)
        row = cache.allocate()
        cache.begin([row], 2048)
        model.decode(tokens[:, :2048], 0, cache)
        cache.advance()

        def call() -> None:  # never advanced: every token is number 2049
            for _ in range(TOKENS):
                cache.begin([row], 1)
                model.decode(tokens[:, 2048:], 2048, cache)

        return call

    return prepare


def main(rounds: int = 5) -> list[Comparison]:
    plain = "the plain path"
    results = []
    for title, config, rows, documents, target, memory in (
        ("training step, tiny, 4 × 512", TINY, 4, 2, 1.0, 1.0),
        ("training step, 4096 tokens of 8 documents, vocabulary 32768", LONG, 1, 8, 1 / 1.5, 0.5),
    ):
        pair = [Contender(n, step(config, rows, documents, b), ours=b == "auto") for n, b in NAMES.items()]
        limits = {"targets": {plain: target}, "memory_targets": {plain: memory}}
        results.append(compare(title, pair, rounds=rounds, **limits))
    pair = [
        Contender("sparse", step(SPARSE, 1, 1, "auto"), ours=True),
        Contender("full attention", step(BLOCK, 1, 1, "auto")),
    ]
    title = "one block at T=32768, forward + backward"
    results.append(compare(title, pair, rounds=min(rounds, 3), targets={"full attention": 1 / 2.5}))
    with torch.inference_mode():  # as `generate` runs
        pair = [Contender("caches", next_tokens(True), ours=True), Contender("all anew", next_tokens(False))]
        results.append(compare(f"{TOKENS} tokens after 2048, tiny", pair, rounds=rounds, targets={"all anew": 1 / 20}))
    return results


NAMES = {"kernel_index": "auto", "the plain path": "reference"}

if __name__ == "__main__":
    main()

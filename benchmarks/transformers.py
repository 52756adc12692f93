"""What does patching a Transformers model bring: time and memory of a training step, and of its body alone?

A Llama of 4 layers, hidden 512, V = 128256, one row of T = 2048 tokens, float32: forward and backward.  Targets: with
the loss patched 1.05× the time and 0.5× the memory of the model as it is; without it 0.95× the time.  The output layer
and its loss are most of such a step, so the layers below them are also timed by themselves.

How much there is to win without the loss depends on the CPU.  On the Xeon of 2026-11-24 the step took 0.80×.  On an
EPYC without AMX, 7.2 of 7.9 profiled seconds are products of weights and the loss over V, which no other patch touches;
attention is 0.55, of which 0.3 are its products at this machine's best rate.  So 0.96× is the least possible there.
"""

from collections.abc import Callable

import torch

import kernel_index as ki
from benchmarks.harness import Comparison, Contender, compare

OPS = ("attention", "fused_linear_cross_entropy", "fused_residual_add_rms_norm", "fused_rope_qk")  # what a patch calls
LAYERS, C, V, T = 4, 512, 128256, 2048


def llama(vocabulary: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=C,
        intermediate_size=4 * C,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).train()


def step(name: str, **options: bool) -> Contender:
    """A training step, patched with these options, or not at all without any."""

    def prepare() -> Callable[[], object]:
        model = llama(V)
        if options:
            ki.transformers.apply(model, **options)
        ids = torch.randint(0, V, (1, T), generator=torch.Generator().manual_seed(1))

        def call() -> None:
            model.zero_grad(set_to_none=True)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

        return call

    return Contender(name, prepare, ours=bool(options))


def body(name: str, documents: int, **options: bool) -> Contender:
    """The layers without the output layer, for one document or several packed into the row."""

    def prepare() -> Callable[[], object]:
        model = llama(1024)
        if options:
            ki.transformers.apply(model, **options)
        ids = torch.randint(0, 1024, (1, T), generator=torch.Generator().manual_seed(1))
        positions = torch.arange(T // documents).repeat(documents)[None]

        def call() -> None:
            model.zero_grad(set_to_none=True)
            out = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
            out.square().mean().backward()

        return call

    return Contender(name, prepare, ours=bool(options))


def main(rounds: int = 9) -> list[Comparison]:
    few = max(1, rounds // 3)  # a step takes seconds
    size = f"Llama, {LAYERS} layers, hidden {C}, T={T}"
    plain = "as it is"
    return [
        compare(
            f"{size}, V={V}: a training step",
            [step("patched", loss=True), step(plain)],
            rounds=few,
            targets={plain: 1.05},
            memory_targets={plain: 0.5},
        ),
        compare(
            f"{size}, V={V}: a training step, without the loss patch",
            [step("patched, loss=False", loss=False), step(plain)],
            rounds=few,
            targets={plain: 0.95},
        ),
        compare(
            f"{size}: the layers alone",
            [body("patched", 1, loss=False), body(plain, 1)],
            rounds=rounds,
            targets={plain: 0.95},
        ),
        compare(
            f"{size}: the layers alone, 8 documents in the row",
            [body("patched", 8, loss=False), body(plain, 8)],
            rounds=rounds,
            targets={plain: 0.95},
        ),
    ]

"""What does a dense decoder of 1.2 B parameters reach on a GPU: ours, and Transformers' with our or Liger's kernels?

``python -m benchmarks.gpu_dense``: a Llama of 16 layers of 2048 channels, 32 heads and 8 KV heads of 64, 128,256
words, two rows of 8192 tokens; forward and backward.  ``lm`` and the ones called ``autocast`` have float32 weights
under bfloat16 autocast, the others bfloat16 weights.  Contenders run one after another, each alone in memory.  MFU
counts 6 FLOPs per weight of a product and 12·D·H per key that a query may see, against 790 TFLOP/s.  Targets: ours
65 %; ``ki.transformers.apply`` 1.05 times Liger-Kernel's tokens per second in no more memory, and under
``torch.compile`` not slower than without.
"""

import contextlib
import copy
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import kernel_index as ki
from benchmarks.gpu_ceiling import PRODUCTS
from benchmarks.gpu_language_model import recorded_step
from benchmarks.gpu_profile import marked, report
from benchmarks.gpu_session import Rows, add_row, needs_gpu
from benchmarks.harness import console
from benchmarks.language_model import packed
from kernel_index.lm.config import ModelConfig
from kernel_index.lm.data import Batch
from kernel_index.lm.model import LanguageModel, flops_per_token
from kernel_index.proofs.numerics import launch_errors

DENSE = ModelConfig(
    pattern="A" * 16, windows=(None,) * 16, dim=2048, heads=32, kv_heads=8, head_dim=64, hidden=8192, context=8192,
    vocab=128_256, padded_vocab=128_256, residual="plain", activation="swiglu",
)  # fmt: skip
TINY = ModelConfig(
    pattern="AA", windows=(None,) * 2, dim=64, heads=4, kv_heads=2, head_dim=16, hidden=128, context=64,
    vocab=512, padded_vocab=512, residual="plain", activation="swiglu",
)  # fmt: skip
ROWS = 2
MODEL = "Llama, 1.2 B parameters, 2 rows of 8192 tokens"

Step = Callable[[], Tensor]


def autocast(device: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16)


def ours(config: ModelConfig, device: str, how: str) -> tuple[Step, torch.nn.Module]:
    """A step of ``lm``: as it is, as a CUDA graph, or compiled."""
    torch.manual_seed(0)
    model = LanguageModel(config).to(device)
    batch = Batch(*(t.to(device) for t in packed(config, ROWS, 1)))
    if how == "graph":
        return recorded_step(model, batch), model
    forward = torch.compile(model, fullgraph=True) if how == "compiled" else model

    def step() -> Tensor:
        with autocast(device):
            loss = forward(batch)
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return step, model


def llama(config: ModelConfig, device: str, dtype: torch.dtype) -> Any:
    import transformers

    shape = transformers.LlamaConfig(
        hidden_size=config.dim, num_hidden_layers=len(config.pattern), num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads, head_dim=config.head_dim, intermediate_size=config.hidden,
        vocab_size=config.vocab, max_position_embeddings=config.context, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):  # a configuration of its own: apply() writes into it
        made = transformers.LlamaForCausalLM._from_config(copy.deepcopy(shape), attn_implementation="sdpa")
    return made.to(dtype)


def theirs(config: ModelConfig, device: str, patch: Callable[[Any], object], how: str) -> tuple[Step, torch.nn.Module]:
    """A step of Transformers' model, patched."""
    casts = "autocast" in how
    model = llama(config, device, torch.float32 if casts else torch.bfloat16)
    patch(model)
    forward = torch.compile(model) if "compiled" in how else model
    tokens = torch.randint(config.vocab, (ROWS, config.context), generator=torch.Generator().manual_seed(1)).to(device)

    def step() -> Tensor:
        with autocast(device) if casts else contextlib.nullcontext():
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return step, model


def liger(model: Any) -> None:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=model)  # rope of all Llamas; norms, SwiGLU and loss of this one


def contenders(config: ModelConfig, device: str) -> Iterator[tuple[str, Callable[[], tuple[Step, torch.nn.Module]]]]:
    """Those that patch their classes come last."""
    hows = ("plain", "compiled") if device == "cpu" else ("plain", "graph", "compiled")
    for how in hows:
        yield f"lm, {how}", lambda how=how: ours(config, device, how)
    ours_without = functools.partial(ki.transformers.apply, norms=False)
    patches = {"apply": ki.transformers.apply, "apply without norms": ours_without, "Transformers": id, "Liger": liger}
    for name, patch in patches.items():
        for how in ("plain", "compiled", "autocast, plain", "autocast, compiled"):
            yield f"{name}, {how}", lambda patch=patch, how=how: theirs(config, device, patch, how)


def measured(step: Step, config: ModelConfig, rounds: int, device: str) -> dict[str, Any]:
    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    loss = step()
    wait()
    first = time.perf_counter() - start
    step()
    step()  # the third may be recorded
    peak = 0.0
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - start)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    took, tokens = statistics.median(seconds), ROWS * config.context
    mfu = flops_per_token(config) * tokens / took / PRODUCTS
    row = {"ms": round(1e3 * took, 1), "tokens_s": round(tokens / took), "mfu": round(mfu, 3), "GiB": round(peak, 1)}
    return row | {"first_s": round(first, 1)} | ({} if loss is None else {"loss": round(float(loss), 4)})


def said(row: dict[str, Any]) -> str:
    loss = f", loss {row['loss']:.4f}" if "loss" in row else ""
    speed = f"{row['ms']:.1f} ms, {row['tokens_s']:,} tokens/s, {100 * row['mfu']:.1f} %"
    return f"{speed}, {row['GiB']:.1f} GiB, first {row['first_s']:.0f} s{loss}"


def main(
    rounds: Annotated[int, typer.Option(help="Steps that are timed; the median counts.")] = 7,
    only: Annotated[str, typer.Option(help="Only contenders whose name contains one of these, by semicolons.")] = "",
    profile: Annotated[bool, typer.Option(help="Also where the time of a step goes.")] = False,
    dry_run: Annotated[bool, typer.Option(help="A tiny model on the CPU; times mean nothing.")] = False,
    out: Rows = None,
) -> None:
    """Time training steps of a dense model of 1.2 B parameters."""
    needs_gpu("a CUDA device; --dry-run does without", dry_run)
    config, device = (TINY, "cpu") if dry_run else (DENSE, "cuda")
    if not dry_run:
        torch.cuda.set_stream(torch.cuda.Stream())
        console.print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}", highlight=False)
    for name, prepare in contenders(config, device):
        if not any(part in name for part in only.split(";")):
            continue
        try:
            step, model = prepare()
            row = measured(step, config, rounds, device)
            console.print(f"{name}: {said(row)}", highlight=False)
            add_row(out, "models", {"model": MODEL, "contender": name} | row)
            if profile and "plain" in name and not dry_run:
                with marked(model):
                    report(name, step)
        except (ImportError, ki.Ineligible, *launch_errors()) as error:
            console.print(f"{name}: left out: {type(error).__name__}: {str(error)[:300]}", highlight=False)
        step = model = None
        torch._dynamo.reset()
        gc.collect()
        if not dry_run:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    typer.run(main)

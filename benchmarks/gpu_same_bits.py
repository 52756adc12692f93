"""Do training and rollout of a Llama of 1.5 B parameters have the same bits on a GPU, and what does a step cost?

``python -m benchmarks.gpu_same_bits``: the model of ``gpu_dense`` in bfloat16 with random weights, under
``ki.transformers.apply(model, numerics="invariant")``.  The base is the training forward over rows of packed documents:
a log-probability in float32 for each token and its last hidden state, which are compared bit by bit with another
packing, with batches that are padded on the left, with a cache that is filled in chunks, and with ``generate``.  Then
the loss and all gradients of the same documents, packed and in batches padded on either side; and training steps of 4
rows of 4096 tokens in turn, invariant and ordinary.
``--hybrid`` instead compares the gradients of the preset ``small`` for other packings, and times its steps in turn, as
they are and as the graph that ``kernel-index train`` replays: 16 rows of 2048 tokens under bfloat16 autocast.
"""

import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

import kernel_index as ki
from benchmarks.gpu_dense import DENSE, TINY, llama
from benchmarks.gpu_language_model import captured_step, model_and_batch, recorded_step
from benchmarks.harness import console
from kernel_index.core.numerics import Mode
from kernel_index.lm.data import Batch
from kernel_index.lm.model import LanguageModel


class Sizes(NamedTuple):
    """Tokens of all documents, of the longest, of a packed row, of a padded batch; and what ``generate`` draws."""

    tokens: int
    longest: int
    row: int
    batch: int
    prompts: int
    drawn: int


LARGE = Sizes(1_000_000, 4096, 16_384, 32_768, 64, 160)
SMALL = Sizes(300, 60, 100, 100, 3, 5)

Rows = list[list[int]]


class Model:
    """The patched model and its documents."""

    def __init__(self, model: Any, sizes: Sizes, seed: int = 0):
        draw = torch.Generator().manual_seed(seed)
        words, device = model.config.vocab_size, model.device
        self.model, self.documents = model, []
        while sum(map(len, self.documents)) < sizes.tokens:
            length = int(torch.randint(2, sizes.longest + 1, (), generator=draw))
            self.documents.append(torch.randint(3, words, (length,), generator=draw).to(device))

    def log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Of tokens, float32: what training takes; −100 for none."""
        with ki.numerics("invariant"):
            return ki.token_log_probs(hidden, self.model.lm_head.weight, targets)

    def packed(self, rows: Rows) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Number, hidden states and log-probabilities of each document, from rows that hold several."""
        for row in rows:
            documents = [self.documents[i] for i in row]
            places = torch.cat([torch.arange(len(d), device=d.device) for d in documents])[None]
            hidden = self.model.model(torch.cat(documents)[None], position_ids=places, use_cache=False)[0][0]
            log_probs = self.log_probs(hidden, torch.cat([following(d) for d in documents]))
            sizes = [len(d) for d in documents]
            yield from zip(row, hidden.split(sizes), log_probs.split(sizes), strict=True)

    def padded(self, batches: Rows) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The same from batches that are padded on the left."""
        for batch in batches:
            documents = [self.documents[i] for i in batch]
            ids, real = left_padded(documents)
            places = (real.cumsum(-1) - 1).clamp(min=0)
            hidden = self.model.model(ids, attention_mask=real, position_ids=places, use_cache=False)[0]
            targets, _ = left_padded([following(d) for d in documents], -100)
            log_probs = self.log_probs(hidden, targets)
            for i, h, p in zip(batch, hidden, log_probs, strict=True):
                yield i, h[-len(self.documents[i]) :], p[-len(self.documents[i]) :]

    def cached(self, numbers: list[int], chunk: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The same, one document after another, from a cache that grows by chunks."""
        from transformers import DynamicCache

        for i in numbers:
            cache = DynamicCache()
            parts = [
                self.model.model(part[None], past_key_values=cache, use_cache=True)[0][0]
                for part in self.documents[i].split(chunk)
            ]
            hidden = torch.cat(parts)
            yield i, hidden, self.log_probs(hidden, following(self.documents[i]))


def following(document: Tensor) -> Tensor:
    return torch.nn.functional.pad(document[1:], (0, 1), value=-100)


def left_padded(documents: list[Tensor], value: int = 0) -> tuple[Tensor, Tensor]:
    longest = max(map(len, documents))
    ids = [torch.nn.functional.pad(d, (longest - len(d), 0), value=value) for d in documents]
    real = [torch.nn.functional.pad(torch.ones_like(d), (longest - len(d), 0)) for d in documents]
    return torch.stack(ids), torch.stack(real)


def filled(lengths: list[int], room: int, order: list[int], widest: bool = False) -> Rows:
    """Numbers in this order, as many in a row as have room: by their sum, or by their number times the longest."""
    rows: Rows = [[]]
    for i in order:
        row = [*rows[-1], i]
        size = len(row) * max(lengths[j] for j in row) if widest else sum(lengths[j] for j in row)
        if rows[-1] and size > room:
            rows.append([])
        rows[-1].append(i)
    return rows


class Compared:
    """What an axis found, printed as it goes."""

    def __init__(self, base: dict[int, tuple[Tensor, Tensor]]):
        self.base, self.exact = base, True

    def show(self, axis: str, found: Iterator[tuple[int, Tensor, Tensor]]) -> None:
        start, tokens, differing, largest = time.perf_counter(), 0, 0, 0.0
        for i, hidden, log_probs in found:
            wanted, expected = self.base[i]
            same = (hidden == wanted).all(-1) & (log_probs == expected)
            tokens, differing = tokens + len(same), differing + int((~same).sum())
            largest = max(largest, float((log_probs - expected).abs().max()))
        self.tell(axis, tokens, differing, largest, time.perf_counter() - start)

    def tell(self, axis: str, tokens: int, differing: int, largest: float, seconds: float) -> None:
        self.exact &= tokens > 0 and differing == 0
        said = "all bits equal" if differing == 0 else f"{differing:,} DIFFER, by up to {largest:.3g}"
        console.print(f"{axis}: {tokens:,} tokens: {said} ({seconds:.1f} s)", highlight=False)


@torch.no_grad()
def compare(model: Any, sizes: Sizes) -> bool:
    """All axes; whether all bits are equal."""
    made, start = Model(model, sizes), time.perf_counter()
    lengths = [len(d) for d in made.documents]
    numbers = list(range(len(lengths)))
    base = {i: (h.clone(), p) for i, h, p in made.packed(filled(lengths, sizes.row, numbers))}
    tokens = sum(lengths)
    console.print(f"base: {tokens:,} tokens in {time.perf_counter() - start:.1f} s", highlight=False)
    compared = Compared(base)
    generated(made, compared, sizes)
    compared.show("a cache in chunks of 1000", made.cached(numbers[: sizes.prompts], 1000))
    compared.show("a cache in chunks of 37", made.cached(numbers[:3], 37))
    shuffled = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(2)).tolist()
    compared.show("another packing and order", made.packed(filled(lengths, sizes.row * 2, shuffled)))
    compared.show("padded batches", made.padded(filled(lengths, sizes.batch, shuffled, widest=True)))
    return compared.exact


def generated(made: Model, compared: Compared, sizes: Sizes) -> None:
    """Tokens that ``generate`` draws, and their logits in a training forward of the packed answers."""
    start, model = time.perf_counter(), made.model
    prompts = [d[: max(1, len(d) // 3)] for d in made.documents[: sizes.prompts]]
    ids, real = left_padded(prompts)
    torch.manual_seed(1)
    drawn = model.generate(
        input_ids=ids, attention_mask=real, max_new_tokens=sizes.drawn, do_sample=True, eos_token_id=-1,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True, use_cache=True,
    )  # fmt: skip
    took = time.perf_counter() - start
    answers = drawn.sequences[:, ids.shape[1] :]
    differing, largest = 0, 0.0
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        other = made.documents[row][:50]  # in front of it in the row, so that the answer lies elsewhere
        document = torch.cat((prompt, answer))
        places = torch.cat([torch.arange(len(d), device=d.device) for d in (other, document)])[None]
        hidden = model.model(torch.cat((other, document))[None], position_ids=places, use_cache=False)[0][0]
        first = len(other) + len(prompt) - 1
        logits = model.lm_head(hidden[first:-1]).float()
        rollout = torch.stack([step[row] for step in drawn.logits])
        differing += int((logits != rollout).any(-1).sum())
        of = [x.log_softmax(-1).gather(-1, answer[:, None]) for x in (logits, rollout)]
        largest = max(largest, float((of[0] - of[1]).abs().max()))
    compared.tell("generate, all logits", answers.numel(), differing, largest, took)


# Time


def step(model: Any, ids: Tensor, **others: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss = model(**({"labels": ids} | others), input_ids=ids, use_cache=False).loss
    loss.backward()
    return loss.detach()


def timed(models: dict[str, Any], ids: Tensor, rounds: int) -> None:
    """Steps in turn, so that all of them see the same state of the machine."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn, (name, model) in itertools.product(range(-2, rounds), models.items()):
        wait(ids)
        start = time.perf_counter()
        step(model, ids)
        wait(ids)
        if turn >= 0:
            seconds[name].append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    taken = {name: statistics.median(of) for name, of in seconds.items()}
    invariant = taken["invariant"]
    for name, of in taken.items():
        ratio = "" if name == "invariant" else f", invariant ÷ it {invariant / of:.3f}"
        span = f"{1e3 * min(seconds[name]):.1f} to {1e3 * max(seconds[name]):.1f}"
        console.print(f"a step of {name}: {1e3 * of:.1f} ms ({span}){ratio}", highlight=False)


DOCUMENTS = (301, 476, 723, 548)
"""Tokens, of a row of 2048: no multiples of a chunk of the scan, so documents are moved."""


def hybrid(rounds: int) -> bool:
    """Gradients of ``small``, then its steps, with documents that fill their chunks and with others."""
    model, filled_ones = model_and_batch("small", 16, recompute=False)
    draw = torch.Generator().manual_seed(1)
    documents = [
        [torch.randint(0, model.config.vocab, (size,), generator=draw) for size in DOCUMENTS] for _ in range(16)
    ]
    moved = Batch(*(x.cuda() for x in Batch.of_documents(documents)))
    exact = packings(model, [document for row in documents for document in row])
    for name, batch in (("documents of 512", filled_ones), (f"documents of {DOCUMENTS}", moved)):
        exact &= recorded_alike(model, batch)
        in_turn(f"a step of small, {name}", eager_steps(model, batch), rounds)
        recorded = {mode: recorded_step(model, batch, mode) for mode in MODES}
        in_turn(f"a step of small as a graph, {name}", recorded, rounds)
    return exact


MODES: tuple[Mode, ...] = ("ordinary", "invariant")


def eager_steps(model: LanguageModel, batch: Batch) -> dict[Mode, Callable[[], None]]:
    def step(mode: Mode) -> None:
        with ki.numerics(mode), torch.autocast("cuda", torch.bfloat16):
            model(batch).backward()
        model.zero_grad(set_to_none=True)

    return {mode: functools.partial(step, mode) for mode in MODES}


def in_turn(what: str, steps: dict[Mode, Callable[[], None]], rounds: int) -> None:
    seconds: dict[Mode, list[float]] = {mode: [] for mode in steps}
    for turn, (mode, step) in itertools.product(range(-3, rounds), steps.items()):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if turn >= 0:
            seconds[mode].append(1e3 * (time.perf_counter() - start))
    taken = {mode: statistics.median(of) for mode, of in seconds.items()}
    spans = ", ".join(f"{mode} {taken[mode]:.1f} ms ({min(of):.1f} to {max(of):.1f})" for mode, of in seconds.items())
    console.print(f"{what}: {spans}: {taken['invariant'] / taken['ordinary']:.3f}", highlight=False)


def recorded_alike(model: LanguageModel, batch: Batch) -> bool:
    """Whether an invariant step has the same loss and gradients as it is and as a graph."""
    captured = captured_step(model, batch)
    share, found = torch.ones((), device="cuda"), []
    with ki.numerics("invariant"):
        for call in range(5):
            loss = captured(model.in_order(batch), share).loss
            if call not in (1, 2):  # the first, which runs as it is, and replays
                found.append([loss.clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
            model.zero_grad(set_to_none=True)
    return told_equal("small as it is and as a graph", found)


@torch.no_grad()
def randomise(model: LanguageModel) -> None:
    """Weights in every layer: a new model's branches end at zero."""
    for weight in model.parameters():
        weight.copy_(0.05 * torch.randn_like(weight) + (weight.ndim == 1) * weight)


def packings(model: LanguageModel, documents: list[Tensor]) -> bool:
    """Whether three packings of the same documents have the same loss and gradients."""
    randomise(model)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(2)).tolist()
    lengths, found = [len(d) for d in documents], []
    for rows in (filled(lengths, 2048, order[::-1]), filled(lengths, 5000, order), [[i] for i in order]):
        batch = Batch(*(x.cuda() for x in Batch.of_documents([[documents[i] for i in row] for row in rows])))
        with ki.numerics("invariant"), torch.autocast("cuda", torch.bfloat16):
            loss = model(batch)
            loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad(set_to_none=True)
    return told_equal("small in three packings", found)


def told_equal(what: str, found: list[list[Tensor]]) -> bool:
    same = all(torch.equal(one, other) for others in found[1:] for one, other in zip(found[0], others, strict=True))
    numbers = sum(x.numel() for x in found[0])
    said = "all bits equal" if same and all(bool(x.any()) for x in found[0]) else "DIFFER, or are zero"
    console.print(f"{what}: loss and gradients, {numbers:,} numbers: {said}", highlight=False)
    return said == "all bits equal"


def wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def repeated(model: Any, ids: Tensor) -> bool:
    """Whether the same documents have the same loss and gradients twice, in one row, and in padded batches."""
    sizes = [len(row) * (i + 1) // len(ids) for i, row in enumerate(ids)]
    documents = [row[:size] for row, size in zip(ids, sizes, strict=True)]
    batches = [in_one_row(documents), in_one_row(documents), in_one_row(documents[::-1])]
    batches += [padded_batch(documents[::-1], left=left) for left in (True, False)]
    found = []
    for batch in batches:
        loss = step(model, **batch)
        found.append([loss, *(p.grad for p in model.parameters())])
        model.zero_grad(set_to_none=True)
    return told_equal("one row twice, in another order, and padded", found)


def in_one_row(documents: list[Tensor]) -> dict[str, Tensor]:
    labels = torch.cat([torch.nn.functional.pad(d[1:], (1, 0), value=-100) for d in documents])
    places = torch.cat([torch.arange(len(d), device=d.device) for d in documents])
    return {"ids": torch.cat(documents)[None], "position_ids": places[None], "labels": labels[None]}


def padded_batch(documents: list[Tensor], left: bool) -> dict[str, Tensor]:
    """Documents in a row each; those that are padded on the right are turned around twice."""
    turn = (lambda x: x) if left else (lambda x: x.flip(-1))
    ids, real = left_padded([turn(d) for d in documents])
    labels, _ = left_padded([turn(torch.nn.functional.pad(d[1:], (1, 0), value=-100)) for d in documents], -100)
    return {"ids": turn(ids), "attention_mask": turn(real), "labels": turn(labels)}


def main(
    rounds: Annotated[int, typer.Option(help="Steps of each model that are timed; the median counts.")] = 7,
    tokens: Annotated[int, typer.Option(help="Tokens that are compared.")] = LARGE.tokens,
    hybrid_steps: Annotated[bool, typer.Option("--hybrid", help="Time steps of small instead.")] = False,
    dry_run: Annotated[bool, typer.Option(help="A tiny model on the CPU; times mean nothing.")] = False,
) -> None:
    """Compare the bits of a patched Llama along its axes, then time its training step."""
    if hybrid_steps:
        torch.cuda.set_stream(torch.cuda.Stream())
        raise typer.Exit(0 if hybrid(rounds) else 1)
    config, device, sizes = (TINY, "cpu", SMALL) if dry_run else (DENSE, "cuda", LARGE._replace(tokens=tokens))
    if not dry_run:
        torch.cuda.set_stream(torch.cuda.Stream())
        console.print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}", highlight=False)
    model = llama(config, device, torch.bfloat16).eval()
    ki.transformers.apply(model, numerics="invariant")
    exact = compare(model, sizes)
    gc.collect()
    model.train()
    ids = torch.randint(3, config.vocab, (4, min(4096, config.context)), generator=torch.Generator().manual_seed(1))
    ids = ids.to(device)
    exact &= repeated(model, ids)
    models = {"invariant": model}
    for name in ("apply", "Transformers"):
        models[name] = llama(config, device, torch.bfloat16).train()
        if name == "apply":
            ki.transformers.apply(models[name])
    timed(models, ids, rounds)
    raise typer.Exit(0 if exact else 1)


if __name__ == "__main__":
    typer.run(main)

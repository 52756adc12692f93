"""The rows of measured times: each of our backends over the cells of attention and decoding."""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernel_index.core.dispatch import Ineligible
from kernel_index.proofs.numerics import launch_errors
from kernel_index.proofs.tune import timing
from kernel_index.proofs.tune.attention_cells import AttentionCell, AttentionInputs
from kernel_index.proofs.tune.decode_cells import DecodeCell, DecodeInputs

ATTENTION = ("fa4", "triton", "gluon", "varlen", "sdpa")
"""Not ``flex``: it compiles for each mask and shape, so it is no rival of the others."""
DECODE = ("fa4", "triton")
WRONG = 3e-2
"""Relative error against float32 from which on a time is not kept: three times what bfloat16 rounding explains."""

Row = dict[str, Any]
Say = Callable[[str], object]


def attention_rows(
    cells: Iterable[AttentionCell], say: Say, device: str = "cuda", backends: tuple[str, ...] = ATTENTION
) -> Iterator[Row]:
    """For each cell a row forward without gradients, and one forward and backward."""
    for cell in cells:
        inputs = AttentionInputs(cell, device)
        known = inputs.truth()
        sizes = [cell.head_size, cell.tokens, cell.rows]
        calls = {name: inputs.ours(name) for name in backends}
        with torch.no_grad():
            right = {n: [c] for n, c in calls.items() if _right(f"{cell.name}, {n}", c, inputs.last, known[:1], say)}
            yield _row(f"{cell.name} infer", ["infer", *cell.kinds], sizes, right)
        steps = {name: inputs.train(call) for name, call in calls.items()}
        name = f"{cell.name} train"
        right = {n: [c] for n, c in steps.items() if _right(f"{name}, {n}", c, inputs.last, known[1:], say)}
        yield _row(name, ["train", *cell.kinds], sizes, right)
        del inputs, known, calls, steps, right


def decode_rows(
    cells: Iterable[DecodeCell], say: Say, device: str = "cuda", backends: tuple[str, ...] = DECODE
) -> Iterator[Row]:
    """For each cell a row of one step over pages, the new token appended."""
    for cell in cells:
        inputs = DecodeInputs(cell, device)
        known = inputs.truth()
        right = {}
        with torch.no_grad():
            for name in backends:
                calls = [functools.partial(inputs.ours(name), i) for i in range(inputs.sets)]
                if _right(f"{cell.name}, {name}", calls[0], lambda out: [out[:1, 0]], (known,), say):
                    right[name] = calls
            yield _row(cell.name, ["paged"], [cell.tokens, cell.rows, cell.page], right)
        del inputs, known, right


def _right(
    name: str, call: Callable[[], Any], part: Callable[..., list[Tensor]], known: tuple[Tensor, ...], say: Say
) -> bool:
    """Whether the call runs and is right; a line says why not."""
    try:
        out = call()
        got = part(*out) if isinstance(out, tuple) else part(out)
        error = max(timing.error_of(a, b) for a, b in zip(got, known, strict=True))
    except Ineligible:
        return False
    except (*launch_errors(), AssertionError, LookupError) as failed:
        if timing.is_broken(failed):
            raise
        say(f"{name}: {type(failed).__name__}: {' '.join(str(failed).split())[:160]}")
        return False
    if not error < WRONG:
        say(f"{name}: relative error {error:.1e}, not timed")
    return error < WRONG


def _row(name: str, kind: list[str], sizes: list[int], calls: Mapping[str, Sequence[timing.Call]]) -> Row:
    """Every backend is timed twice, the second time in the other order; the smaller time counts."""
    us: dict[str, float] = {}
    for backend in (*calls, *reversed(list(calls))):
        taken = timing.device_us(calls[backend])[0]
        us[backend] = round(min(us.get(backend, taken), taken), 2)
    return {"cell": name, "kind": kind, "sizes": sizes, "us": us}


def text_of(facts: dict[str, Any], rows: dict[str, list[Row]]) -> str:
    """A file for ``kernel_index/core/crossovers``: a line for each row."""
    parts = [f' "{name}": {json.dumps(value, ensure_ascii=False)}' for name, value in facts.items()]
    for op, found in rows.items():
        lines = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in found)
        parts.append(f' "{op}": [\n{lines}\n ]')
    return "{\n" + ",\n".join(parts) + "\n}\n"

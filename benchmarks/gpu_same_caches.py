"""Do caches of a hybrid model on a GPU give the bits of its training forward, over a million tokens?

``python -m benchmarks.gpu_same_caches``: the preset ``small`` in bfloat16 with random weights, under
``ki.numerics("invariant")``.  The base is a training forward over packed rows.  Log-probabilities of the same sequences
come from a cache that grows token by token, and by chunks of 1 to 150 tokens in pages of another size and order.  The
sequences of a group have one length: S and L compute rows of one length in one call.  The last axis mixes lengths.
"""

import time
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor

import kernel_index as ki
from benchmarks.gpu_same_bits import randomise
from benchmarks.harness import console
from kernel_index.lm.config import PRESETS
from kernel_index.lm.data import START
from kernel_index.lm.model import LanguageModel
from kernel_index.lm.rollout_axes import Finding, decoded, packed, trained


class Way(NamedTuple):
    """Sequences of a group, their lengths, tokens of a step at most, tokens of a page, and pages in a mixed order."""

    together: int
    shortest: int
    longest: int
    chunk: int
    page: int
    scattered: bool = False
    mixed: bool = False  # lengths and chunks that differ within a group


WAYS = {
    "token by token": Way(768, 640, 760, 1, 16),
    "chunks": Way(64, 500, 2048, 150, 64),
    "scattered pages": Way(64, 500, 2048, 150, 16, scattered=True),
    "mixed lengths": Way(32, 2, 2048, 150, 5, mixed=True),
}


def group_of(way: Way, draw: torch.Generator) -> list[Tensor]:
    def length() -> int:
        return int(torch.randint(way.shortest, way.longest + 1, (), generator=draw))

    sizes = [length() for _ in range(way.together)] if way.mixed else [length()] * way.together
    return [torch.cat((torch.tensor([START]), torch.randint(0, START, (n - 1,), generator=draw))) for n in sizes]


class Chunks:
    """How many tokens each sequence reads in a step: one number for all of a step, or one for each."""

    def __init__(self, way: Way, draw: torch.Generator):
        self.way, self.draw, self.asked, self.tokens = way, draw, 0, 1

    def next(self) -> int:
        if self.way.mixed or self.asked % self.way.together == 0:
            self.tokens = int(torch.randint(1, self.way.chunk + 1, (), generator=self.draw))
        self.asked += 1
        return self.tokens


@torch.no_grad()
def compare(model: LanguageModel, name: str, way: Way, tokens: int, seed: int) -> bool:
    """Groups of sequences until there are so many tokens; printed as they are done."""
    draw, finding, start = torch.Generator().manual_seed(seed), Finding(), time.perf_counter()
    while finding.compared < tokens:
        group = group_of(way, draw)
        expected: list[Tensor] = []
        for part in (group[first : first + 256] for first in range(0, len(group), 256)):
            expected += trained(model, packed(part, model.config.context), part)
        options = {"page": way.page, "scattered": way.scattered, "at_once": way.together}
        finding.compare(decoded(model, group, chunk=Chunks(way, draw).next, **options), expected)
        said = "all bits equal" if finding.is_exact else f"{finding.differing:,} DIFFER, by up to {finding.largest:.3g}"
        took = time.perf_counter() - start
        console.print(f"{name}: {finding.compared:,} log-probabilities: {said} ({took:.0f} s)", highlight=False)
    return finding.is_exact


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of each axis, or a group more.")] = 1_000_000,
    only: Annotated[str, typer.Option(help="Only axes whose name contains this.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of weights and sequences.")] = 0,
    dry_run: Annotated[bool, typer.Option(help="The preset tiny on the CPU, short sequences.")] = False,
) -> None:
    """Compare log-probabilities of a rollout with those of training, bit by bit."""
    torch.manual_seed(seed)
    model = LanguageModel(PRESETS["tiny" if dry_run else "small"].model)
    randomise(model)
    if not dry_run:
        model = model.cuda().to(torch.bfloat16)
    exact = True
    with ki.numerics("invariant"):
        for name, way in WAYS.items():
            if only not in name:
                continue
            if dry_run:
                way = way._replace(together=4, shortest=2 if way.mixed else 20, longest=30)
            exact &= compare(model.eval(), name, way, 1 if dry_run else tokens, seed)
    raise typer.Exit(0 if exact else 1)


if __name__ == "__main__":
    typer.run(main)

"""What libtpu's dumps say about a compiled kernel: memory, bundles of each loop, spills, use of the slots.

A bundle is one instruction word.  Counts are of code, not of time: a loop's bundles times its steps is how many are
issued, which says nothing about waiting.  libtpu's own ``estimated_cycles`` follow no loop whose bounds are read at run
time, so they may only be believed where they are at least flops ÷ peak; see ``believable``.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

FLAGS = (
    "--xla_jf_dump_to={folder}",
    "--xla_jf_dump_llo_text=true",
    "--xla_jf_dump_llo_pass_label_regex=(final_bundles|original|utilization)",
)
PROFILE = "--xla_jf_dump_static_llo_profile_to={folder}/profile"
PEAK_FLOPS = {"v5e": 131_072, "v6e": 524_288, "v5p": 262_144}
"""bfloat16 flops in a cycle, from published peaks and clocks."""


@dataclass(frozen=True)
class Loop:
    """A loop of the kernel: how deep it is nested and its bundles, those of loops inside left out.

    ``regions`` are the bundles of its predicated regions: code that a branch may skip.
    """

    depth: int
    bundles: int
    regions: tuple[int, ...] = ()

    @property
    def widest(self) -> int:
        return max(self.regions, default=0)


@dataclass(frozen=True)
class KernelFigures:
    """One kernel.  Memory in bytes; ``slots`` is the share of each slot's capacity that its instructions fill."""

    name: str
    bundles: int
    loops: tuple[Loop, ...]
    spill_stores: int
    vmem: int
    smem: int
    slots: dict[str, float] = field(hash=False)
    cycles: int | None = None

    def at_depth(self, depth: int) -> list[Loop]:
        return [loop for loop in self.loops if loop.depth == depth]


LINE = re.compile(r"\s*0x[0-9a-f]+\s*(L[HBE]|P[BF]|CT)?\s*:\s*(>*)\s*\{(.*)")


def loops_of(bundles: str) -> tuple[Loop, ...]:
    """The loops of a ``final_bundles`` dump, in the order of their headers."""
    open_loops: list[dict] = []
    found: list[dict] = []
    for line in bundles.splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        label, depth, code = match[1], len(match[2]), match[3]
        if code.startswith("}") and open_loops:
            depth = open_loops[-1]["depth"]  # an empty bundle carries no mark
        while open_loops and open_loops[-1]["depth"] > depth:
            open_loops.pop()
        if label == "LB" and depth:
            open_loops = [loop for loop in open_loops if loop["depth"] < depth]
            open_loops.append({"depth": depth, "bundles": 0, "regions": [], "skip": None})
            found.append(open_loops[-1])
        if not open_loops or open_loops[-1]["depth"] != depth:
            continue
        loop = open_loops[-1]
        if label == "PF" and loop["skip"] is not None:
            loop["regions"].append(loop["bundles"] - loop["skip"])
            loop["skip"] = None
        loop["bundles"] += 1
        if "sbr.rel" in code and loop["skip"] is None:
            loop["skip"] = loop["bundles"]
    return tuple(Loop(x["depth"], x["bundles"], tuple(x["regions"])) for x in found)


def figures(folder: Path) -> list[KernelFigures]:
    """The Pallas kernels and fusions of a dump folder that have a loop over the grid."""
    found = []
    for path in sorted(folder.glob("*final_hlo-static-per-bundle-utilization.txt")):
        name = re.sub(r"^\d+-|-\d+-final_hlo.*", "", path.name)
        prefix = path.name.split("-")[0] + "-" + name
        rows = path.read_text().splitlines()
        slots = [x.strip() for x in rows[1].split(",")]
        capacity = [int(x) for x in rows[2].split()]
        used = [[int(x) for x in row.split()] for row in rows[4:] if row.strip()]
        totals = [sum(column) for column in zip(*used, strict=True)]
        text = _read(folder, prefix, "final_bundles", exclude="schedule")
        original = _read(folder, prefix, "original")
        shares = {s: round(t / (c * len(used)), 3) for s, t, c in zip(slots, totals, capacity, strict=True)}
        spills = dict(zip(slots, totals, strict=True)).get("VSTORE:SPILL", 0)
        memory = (_scoped(original, "vmem"), _scoped(original, "smem"))
        cycles = _cycles(folder / "profile", name)
        found.append(KernelFigures(name, len(used), loops_of(text), spills, *memory, shares, cycles))
    return found


def _read(folder: Path, prefix: str, what: str, exclude: str = "\n") -> str:
    paths = (p for p in folder.glob(f"{prefix}-*{what}.txt") if exclude not in p.name)
    return next((p.read_text() for p in paths), "")


def _scoped(original: str, space: str) -> int:
    sizes = re.findall(rf"space={space}, size = (0x[0-9a-f]+), scoped", original)
    return sum(int(size, 16) for size in sizes)


def _cycles(profile: Path, name: str) -> int | None:
    for path in profile.glob("*.textproto"):
        text = path.read_text()
        estimate = re.search(r"estimated_cycles: (\d+)", text)
        if f'hlo_op_name: "{name}"' in text and estimate:
            return int(estimate[1])
    return None


def believable(cycles: int, flops: float, generation: str) -> str | None:
    """Why an estimate is refused, or None: nothing computes faster than its peak."""
    peak = PEAK_FLOPS.get(generation)
    if peak is None:
        return "no peak is known for this generation"
    least = flops / peak
    return f"below flops ÷ peak ({least:,.0f} cycles)" if cycles < least else None


def kernels_named(found: Iterable[KernelFigures], *parts: str) -> list[KernelFigures]:
    return [k for k in found if any(part in k.name for part in parts)]

"""Does a loop fill a tile in shared memory that a product may still read?

Triton 3.6 gives a load that a loop has ahead two tiles where something reads it into registers, and three where a
product reads it from shared memory.  A load that had both got two: the next copy fell on the tile of a product for
which nobody had waited.  Experts were chosen at random then, in one of a hundred tokens, and only for some dtypes.

This follows the text of Triton's GPU dialect: the turns of each loop one after another, with the numbers that say which
tile is meant, and the products that are under way.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

TURNS = 16
"""Of each loop: more than any number of tiles, several times."""

DOT = "ttng.warp_group_dot "
VALUE = r"%[\w.#-]+"
_RESULT = re.compile(rf"^\s*({VALUE})(?::\d+)? = (.*)$")
_LOOP = re.compile(rf"scf\.for {VALUE} = {VALUE} to {VALUE} step {VALUE}(?: iter_args\((.*?)\) ->)?")
_COUNTS = re.compile(r"memdesc|async_|local_|warp_group_dot|scf\.yield|arith\..* : i\d+$")
"""In a line that says something about tiles, or about numbers that may count them."""

_WRITES = ("async_copy_global_to_local", "local_store", "async_tma_copy_global_to_local", "async_tma_gather")
_VIEWS = ("memdesc_index", "memdesc_trans", "memdesc_subslice", "memdesc_reinterpret", "memdesc_reshape")


class Place(NamedTuple):
    """A tile: an allocation, and its number in it; None where the number is not known."""

    allocation: str
    number: int | None


def overwritten(code: str) -> list[str]:
    """The copies and stores, as lines of Triton's GPU dialect, that fall on a tile of a product under way.

    None where the text has another form, as that of another version may have: a check must not stop a kernel.
    """
    if DOT not in code:
        return []
    try:
        return _found_in(code)
    except (LookupError, ValueError, StopIteration):
        return []


def _found_in(code: str) -> list[str]:
    lines = [line.split(" loc(", 1)[0] for line in code.splitlines()]
    found: dict[str, None] = {}
    for start, line in enumerate(lines):
        if (match := _LOOP.search(line)) is None:
            continue
        body = _own(_body(lines, start))
        if any(DOT in inner for inner in body):
            initial = dict(re.findall(rf"({VALUE}) = ({VALUE})", match[1] or ""))
            found |= dict.fromkeys(_Loop(body, initial, _constants(lines)).conflicts())
    return list(found)


def _body(lines: list[str], start: int) -> list[str]:
    """The lines of a loop, without those of its first and last."""
    indent = len(lines[start]) - len(lines[start].lstrip())
    end = next(i for i in range(start + 1, len(lines)) if lines[i].startswith(" " * indent + "}"))
    return lines[start + 1 : end]


def _own(body: list[str]) -> list[str]:
    """Without the loops inside of it, which are followed by themselves."""
    found, at = list[str](), 0
    while at < len(body):
        found.append(body[at])
        at += 1 + (len(_body(body, at)) if _LOOP.search(body[at]) else 0)
    return found


def _constants(lines: list[str]) -> dict[str, int]:
    pattern = re.compile(rf"({VALUE}) = arith\.constant (-?\d+) : i(?:32|64)")
    return {m[1]: int(m[2]) for line in lines if (m := pattern.search(line))}


class _Loop:
    """The turns of a loop: numbers that are known, views of shared memory, and products under way."""

    def __init__(self, body: list[str], initial: dict[str, str], constants: dict[str, int]):
        self.body = [line for line in body if _COUNTS.search(line)]
        self.carried = list(initial)
        self.numbers: dict[str, int | None] = constants | {name: constants.get(v) for name, v in initial.items()}
        self.views: dict[str, Place] = {}
        self.under_way: list[set[Place]] = []

    def conflicts(self) -> Iterator[str]:
        for _ in range(TURNS):
            for line in self.body:
                if self._fills(line) & set().union(*self.under_way):
                    yield line.strip()
                self._follow(line)
            self._next_turn()

    def _place(self, name: str) -> Place:
        return self.views.get(name, Place(name, 0))

    def _fills(self, line: str) -> set[Place]:
        if "ttg.local_alloc %" in line and (match := _RESULT.match(line)):
            return {Place(match[1], 0)}
        if any(f".{write} " in line for write in _WRITES):
            named = {self.views[name] for name in re.findall(VALUE, line.split(" : ")[0]) if name in self.views}
            return {place for place in named if place.number is not None}
        return set()

    def _follow(self, line: str) -> None:
        if "warp_group_dot_wait" in line and (match := re.search(r"pendings = (\d+)", line)):
            self.under_way = self.under_way[len(self.under_way) - int(match[1]) :] if int(match[1]) else []
        elif DOT in line:
            a, b = re.findall(VALUE, line.split("warp_group_dot", 1)[1])[:2]
            self.under_way.append({self._place(a), self._place(b)})
            if "isAsync = true" not in line:
                self.under_way = []
        elif match := _RESULT.match(line):
            self._name(*match.groups())

    def _name(self, result: str, right: str) -> None:
        operands = re.findall(VALUE, right.split(" : ")[0])
        if any(f"ttg.{view} " in right for view in _VIEWS):
            place = self._place(operands[0])
            if "memdesc_index" in right:
                place = Place(place.allocation, self.numbers.get(operands[1]))
            self.views[result] = place
        elif right.startswith("arith."):
            self.numbers[result] = _computed(right, [self.numbers.get(name) for name in operands])

    def _next_turn(self) -> None:
        last = self.body[-1] if self.body else ""  # a loop without results ends otherwise
        given = re.findall(VALUE, last.split(" : ")[0]) if "scf.yield" in last else []
        values = [self.numbers.get(name) for name in given]
        self.numbers |= dict(zip(self.carried, values, strict=False))


def _computed(right: str, operands: list[int | None]) -> int | None:
    """What becomes of numbers that count tiles; None for anything else."""
    if "arith.select" in right and operands[0] is not None:
        return operands[1] if operands[0] else operands[2]
    if None in operands or len(operands) != 2:
        return None
    a, b = operands
    comparisons = {"sge": a >= b, "slt": a < b, "eq": a == b, "sgt": a > b, "sle": a <= b, "ne": a != b}  # type: ignore[operator]
    if match := re.match(r"arith\.cmpi (\w+),", right):
        return int(comparisons[match[1]]) if match[1] in comparisons else None
    sums = {"arith.addi": a + b, "arith.subi": a - b, "arith.muli": a * b}  # type: ignore[operator]
    if right.startswith("arith.remsi"):
        return a % b if b else None  # type: ignore[operator]
    return sums.get(right.split(" ")[0])

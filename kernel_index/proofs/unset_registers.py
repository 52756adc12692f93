"""Does machine code read a uniform register that no path to it has written?

ptxas 12.8 compiled two loops after one another, with products that read the same tile, so that the second one used a
descriptor which only the code in front of the first one had made.  Where the first loop had no turn, products read
shared memory at random.  Such a kernel compiles without a word, and a test may pass.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

WRITERS = frozenset(
    [
        "R2UR",
        "REDUX",
        "S2UR",
        "UBMSK",
        "UBREV",
        "UF2FP",
        "UFLO",
        "UI2F",
        "UIADD3",
        "UIMAD",
        "ULDC",
        "ULEA",
        "ULEPC",
        "ULOP3",
        "UMOV",
        "UPOPC",
        "UPRMT",
        "USEL",
        "USGXT",
        "USHF",
        "VOTEU",
    ]
)
"""Instructions whose result is a uniform register, perhaps after predicates."""

ZERO = 63  # its number, where it is not written as URZ


class Instruction(NamedTuple):
    text: str
    predicated: bool
    name: str
    writes: tuple[int, ...]
    reads: tuple[int, ...]


def reads_of_unset(code: str) -> list[str]:
    """The instructions of nvdisasm's output that may read a uniform register before it is written."""
    instructions, labels = _parsed(code)
    everything = (1 << ZERO) - 1
    known = [everything] * len(instructions)  # registers that all paths to an instruction have written
    known[:1] = [0]
    todo, reached = [0] if instructions else [], {0}
    while todo:
        at = todo.pop()
        after = known[at]
        for register in instructions[at].writes:  # a predicated write counts: what reads it has the same predicate
            after |= 1 << register
        for following in _following(at, instructions[at], labels):
            if following < len(known) and (following not in reached or known[following] & ~after):
                known[following] &= after
                reached.add(following)
                todo.append(following)
    return [
        instructions[at].text
        for at in sorted(reached)
        if at < len(instructions) and any(not known[at] >> register & 1 for register in instructions[at].reads)
    ]


def _parsed(code: str) -> tuple[list[Instruction], dict[str, int]]:
    instructions, labels = list[Instruction](), dict[str, int]()
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", line):
            instructions.append(_instruction(bool(found[1]), found[2], found[3]))
    return instructions, labels


def _instruction(predicated: bool, name: str, operands: str) -> Instruction:
    writes = tuple[int, ...]()
    rest = operands
    if name.split(".")[0] in WRITERS and (found := re.match(r"(?:U?P\w+,\s*)*UR(\d+)\b", operands)):
        first, rest = int(found[1]), operands[found.end() :]
        writes = (first, first + 1) if ".64" in name or "WIDE" in name else (first,)
    reads = [int(number) for number in re.findall(r"(?<!gdesc\[)\bUR(\d+)\b", rest)]
    for number in re.findall(r"gdesc\[UR(\d+)\]", rest):  # two tiles, or one where the first operand is in registers
        from_registers = re.match(r"\w+, R\d+, gdesc", operands) is not None
        reads += range(int(number) + (2 if from_registers else 0), int(number) + 4)
    text = f"{name} {operands}"
    return Instruction(text, predicated, name, writes, tuple(r for r in reads if r < ZERO))


def _following(at: int, instruction: Instruction, labels: dict[str, int]) -> Iterator[int]:
    targets = [labels[label] for label in re.findall(r"\.L_x_\d+", instruction.text) if label in labels]
    if instruction.name.startswith(("BRA", "BRX")):
        yield from targets
    always = instruction.name in ("BRA", "EXIT") and not re.match(r"\w+ !?U?P", instruction.text)
    if not (always and not instruction.predicated) and not instruction.name.startswith("BRX"):
        yield at + 1

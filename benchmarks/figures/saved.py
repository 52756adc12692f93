"""A file of figures: what ``--save`` writes and ``--load`` and ``--compare`` read."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import Comparison, Row
from kernel_index.core.atomic_write import write_whole
from kernel_index.proofs.record import machine


@dataclass(frozen=True)
class Figures:
    """``verified``: op -> backend -> how many calls passed and were refused; ``peers``: peer -> why it has no row."""

    comparisons: list[Comparison]
    machine: dict[str, Any] = field(default_factory=machine)
    verified: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    peers: dict[str, str] = field(default_factory=dict)


def save(figures: Figures, path: Path) -> None:
    write_whole(path, json.dumps(asdict(figures), indent=1, ensure_ascii=False) + "\n")


def load(path: Path) -> Figures:
    """Read a file of ``--save``, or one of ``python -m benchmarks.gpu``.

    Raises:
        ValueError: the file is neither, or cannot be read.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"FILE must hold saved figures, got {path}: {error}") from error
    try:
        if "lines" in content:
            return Figures(_from_gpu(content["lines"]), dict(content["environment"]))
        comparisons = [Comparison(**c | {"rows": [Row(**r) for r in c["rows"]]}) for c in content["comparisons"]]
        return Figures(comparisons, content["machine"], content.get("verified", {}), content.get("peers", {}))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"FILE must hold saved figures, got {path}, which lacks or misnames {error}") from error


def _from_gpu(lines: list[dict[str, Any]]) -> list[Comparison]:
    rows: dict[str, list[Row]] = {}
    for line in lines:  # one median each; a graph has no first call
        row = Row(line["contender"], [line["seconds"]], None, line["memory"], line["share"])
        rows.setdefault(f"{line['question']}, {line['direction']}", []).append(row)
    ours = "kernel_index"
    return [Comparison(t, found, ours) for t, found in rows.items() if ours in [r.contender for r in found]]

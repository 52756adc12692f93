"""Figures for people: a table in Markdown, a plot in SVG."""

from pathlib import Path

from benchmarks.figures.saved import Figures
from benchmarks.harness import Comparison, Row, duration


def markdown(figures: Figures) -> str:
    """Every comparison as a row for each contender; below it what was proved first and which peers are absent."""
    shares = any(r.share is not None for c in figures.comparisons for r in c.rows)
    head = ["question", "contender", "median", "first call", "extra memory", "ours ÷ it, time", "ours ÷ it, memory"]
    lines = [", ".join(f"{k} {v}" for k, v in figures.machine.items()), "", *_head(head + shares * ["share of a copy"])]
    for c in figures.comparisons:
        for r in c.rows:
            cells = [c.title, r.contender, *_cells(c, r)]
            if shares:
                cells.append("" if r.share is None else f"{100 * r.share:.0f} %")
            lines.append(_row(cells))
    if figures.verified:
        lines += ["", "Proved against float64 before timing: " + "; ".join(_proved(figures.verified)) + "."]
    if figures.peers:
        lines += ["", *_head(["peer", "why it has no row"]), *(_row(list(p)) for p in figures.peers.items())]
    return "\n".join(lines) + "\n"


def _cells(c: Comparison, r: Row) -> list[str]:
    first = "" if r.first is None else duration(r.first)
    memory = "" if r.memory is None else f"{r.memory / 2**20:,.0f} MiB"
    if r.contender == c.ours:
        return [duration(r.median), first, memory, "", ""]
    of_memory = c.memory_ratio(r.contender)
    ratio = f"{c.ratio(r.contender):.2f}"
    return [duration(r.median), first, memory, ratio, "" if of_memory is None else f"{of_memory:.2f}"]


def _proved(verified: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    ran = {op: [b for b, row in backends.items() if row["passed"]] for op, backends in verified.items()}
    return [f"{op} ({', '.join(names)})" for op, names in ran.items() if names]


def _head(names: list[str]) -> list[str]:
    return [_row(names), "|" + "---|" * len(names)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def plot(figures: Figures, path: Path) -> None:
    """A bar for ours ÷ each contender's time, on a logarithmic axis: left of the line at 1 we are faster."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kernel-index"  # the same figures give the same file
    from matplotlib import pyplot

    bars = [(c, r) for c in figures.comparisons for r in c.rows if r.contender != c.ours]
    figure, axes = pyplot.subplots(figsize=(10, 0.9 + 0.3 * len(bars)), layout="constrained")
    ratios = [c.ratio(r.contender) for c, r in bars]
    at = range(len(bars))
    axes.barh(at, [ratio - 1 for ratio in ratios], left=1, color=["C0" if x <= 1 else "C3" for x in ratios])
    axes.set_yticks(at, [f"{c.title}  ÷ {r.contender}" for c, r in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("our time ÷ theirs: below 1 we are faster")
    axes.set_title(", ".join(str(v) for v in figures.machine.values()), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)

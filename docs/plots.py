"""Plots of committed results, drawn when the site is built: SVG whose colours follow the mode of the page."""

import io
import math
import re
from collections.abc import Callable
from typing import Any

Draw = Callable[[Any, dict[str, Any]], None]
WIDTH = 4.7  # inches; a phone shows it at four fifths, which keeps the letters readable
INK, GRID = "#010203", "#040506"
COLOURS = ("#3b82d6", "#d9822b", "#2f9e6e", "#b65fcf", "#8a8f98")
"""Readable on white and on near black."""

NAMES = {"rms": "residual + RMSNorm", "relu2": "relu²", "dropout": "bias + dropout + add", "bias_add": "bias + add"}
NAMES |= {"rope": "RoPE of Q and K", "mhc": "hyper-connections", "mla": "MLA projection"}


def svg(draw: Draw, content: dict[str, Any], height: float, alt: str) -> str:
    """The plot as a figure for a page: one line of HTML."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "kernel-index",  # the same figures give the same file
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": GRID,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": GRID,
        "legend.frameon": False,
    }
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(WIDTH, height), layout="constrained")
        draw(axes, content)
        made = io.StringIO()
        figure.savefig(made, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    text = made.getvalue()[made.getvalue().index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"font: (?:\d+ )?([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = text.replace(INK, "currentColor").replace(GRID, "var(--md-default-fg-color--lighter)")
    text = text.replace("<svg ", f'<svg role="img" aria-label="{alt}" ', 1)
    return f'<figure class="ki-plot" markdown="0">{" ".join(text.split())}</figure>'


def share_by_width(direction: str) -> Draw:
    """Share of a copy's bandwidth over the width of a row, for the kernels that were measured at several widths."""

    def draw(axes: Any, content: dict[str, Any]) -> None:
        cells = [c for c in content["memory_bound"] if c["rows"] == 8192 and c[direction]["share"] is not None]
        for colour, kernel in zip(COLOURS, ("rms", "bias_add", "dropout"), strict=False):
            points = sorted((c["width"], 100 * c[direction]["share"]) for c in cells if c["kernel"] == kernel)
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=NAMES[kernel])
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks := [1024, 2048, 4096, 8192, 16384], [str(t) for t in ticks])
        axes.set_ylim(0, 105)
        axes.set_title(direction, fontsize=10)
        axes.set_xlabel("width of a row, 8192 rows")
        axes.set_ylabel("% of a copy's bandwidth")
        axes.grid(axis="y", linewidth=0.6)
        axes.legend(loc="lower right")

    return draw


def ratios_of_attention(axes: Any, content: dict[str, Any]) -> None:
    """A bar for each case: our time ÷ that of the fastest peer."""
    rows = sorted((c for c in content["attention"] if "ratio" in c), key=lambda c: -c["ratio"])  # a peer ran it
    _bars(axes, [c["case"] for c in rows], [c["ratio"] for c in rows], "our time ÷ the fastest peer's")


def ratios_of_memory_bound(axes: Any, content: dict[str, Any]) -> None:
    """Two bars for each kernel: the geometric mean of our time ÷ the fastest peer's, over its sizes."""
    names, values = [], []
    for kernel in dict.fromkeys(c["kernel"] for c in content["memory_bound"]):
        for direction in ("backward", "forward"):
            found = [c[direction]["ratio"] for c in content["memory_bound"] if c["kernel"] == kernel]
            names.append(f"{NAMES[kernel]}, {direction}")
            values.append(math.prod(found) ** (1 / len(found)))
    _bars(axes, names[::-1], values[::-1], "mean of our time ÷ the fastest peer's")


def _bars(axes: Any, names: list[str], values: list[float], label: str) -> None:
    places = range(len(values))
    axes.barh(places, values, height=0.7, color=[COLOURS[1] if v > 1.02 else COLOURS[0] for v in values])
    axes.set_yticks(places, names, fontsize=8)
    axes.axvline(1, color=INK, linewidth=1)
    for y, v in zip(places, values, strict=True):
        axes.annotate(f"{v:.2f}", (max(v, 1), y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, max(values) * 1.12)
    axes.set_ylim(-0.6, len(values) - 0.4)
    axes.set_xlabel(label)


def sparse_over_tokens(axes: Any, content: dict[str, Any]) -> None:
    """Forward + backward over the number of tokens: dense attention, and 16 blocks that are random or shared."""
    shown = {
        ("dense SDPA", "random"): "SDPA, dense",
        ("dense FA4", "random"): "FlashAttention-4, dense",
        ("kernel_index moba query_head", "random"): "MoBA, each query head routes",
        ("kernel_index clustered", "random"): "clustered, at random",
        ("kernel_index clustered", "shared"): "clustered, shared by neighbours",
    }
    rows = [r for r in content["sparse"] if r["heads"] == 32 and "train_ms" in r]
    _lines(axes, rows, shown, (COLOURS[4], *COLOURS[1:3], COLOURS[0], COLOURS[3]))


def tokens_over_tokens(axes: Any, content: dict[str, Any]) -> None:
    """Forward + backward over the number of tokens: dense attention, and 2048 selected tokens."""
    shown = {
        ("dense FA4", "random"): "FlashAttention-4, dense",
        ("kernel_index exact_token", "random"): "2048 tokens, at random",
        ("kernel_index exact_token", "shared"): "2048 tokens, shared by neighbours",
    }
    lengths = {r["tokens"] for r in content["exact_tokens"]}
    rows = [r for r in content["sparse"] + content["exact_tokens"] if r["heads"] == 32 and r["tokens"] in lengths]
    _lines(axes, [r for r in rows if "train_ms" in r], shown, COLOURS[1:])


def _lines(axes: Any, rows: list[dict[str, Any]], shown: dict[tuple[str, str], str], colours: tuple[str, ...]) -> None:
    for colour, (key, label) in zip(colours, shown.items(), strict=False):
        _line(axes, sorted((r["tokens"], r["train_ms"]) for r in rows if (r["contender"], r["selection"]) == key),
              colour, label)  # fmt: skip
    _over_tokens(axes, "tokens", "ms, forward + backward")


def decode_over_tokens(axes: Any, content: dict[str, Any]) -> None:
    """One decoding step of one row over the tokens in its cache."""
    shown = {
        "kernel_index auto": "auto",
        "FA4 paged": "FlashAttention-4, paged",
        "kernel_index triton": "triton",
        "FlashInfer": "FlashInfer",
        "SDPA contiguous": "SDPA, contiguous keys",
    }
    rows = [r for r in content["decode"] if r["rows"] == 1 and r["page"] == 64]
    for colour, (contender, label) in zip(COLOURS, shown.items(), strict=True):
        points = sorted(
            (r["tokens"], us) for r in rows for name, us in r["us"].items() if name.partition("(")[0] == contender
        )
        if points:  # a library may not have been there
            _line(axes, points, colour, label)
    _over_tokens(axes, "tokens in the cache", "µs for one step")


def _line(axes: Any, points: list[tuple[int, float]], colour: str, label: str) -> None:
    axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=label)


def _over_tokens(axes: Any, x: str, y: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    tokens = sorted({int(t) for line in axes.lines for t in line.get_xdata() if int(t) & (int(t) - 1) == 0})
    axes.set_xticks(tokens, [f"{t // 1024}k" for t in tokens])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    ticks = [b * 10**e for e in range(5) for b in (1, 2, 5) if low <= b * 10**e <= high]
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y", linewidth=0.6)
    axes.legend(fontsize=8)

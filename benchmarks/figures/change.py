"""What changed between two files of figures.

Times of two runs are not comparable on a noisy machine, but ours ÷ a contender's is.  A comparison counts as slower
when that ratio grew beyond ``LIMIT`` against every contender that both files have: if only one ratio grew, the
contender improved.
"""

from dataclasses import dataclass

from benchmarks.figures.saved import Figures
from benchmarks.harness import Comparison

LIMIT = 1.10


@dataclass(frozen=True)
class Change:
    """Ours ÷ the contender's time, or our own bytes, then and now."""

    title: str
    contender: str
    what: str
    old: float
    new: float

    @property
    def growth(self) -> float:
        return self.new / self.old


def changes(old: Figures, new: Figures) -> list[Change]:
    """Every ratio that both files have."""
    before = {c.title: c for c in old.comparisons}
    return [change for c in new.comparisons if c.title in before for change in _of(before[c.title], c)]


def _of(old: Comparison, new: Comparison) -> list[Change]:
    known = {r.contender for r in old.rows if r.contender != old.ours}
    names = [r.contender for r in new.rows if r.contender in known and r.contender != new.ours]
    found = [Change(new.title, name, "time", old.ratio(name), new.ratio(name)) for name in names]
    was, now = old.row(old.ours).memory, new.row(new.ours).memory
    if was and now:
        found.append(Change(new.title, new.ours, "memory", was, now))
    return found


def regressions(found: list[Change], limit: float = LIMIT) -> list[str]:
    """The titles that became slower or larger, with what and by how much."""
    worse = []
    for title in dict.fromkeys(c.title for c in found):
        for what in ("time", "memory"):
            growth = [c.growth for c in found if (c.title, c.what) == (title, what)]
            if growth and min(growth) > limit:
                worse.append(f"{title}: {what} × {min(growth):.2f}")
    return worse


def missing(old: Figures, new: Figures) -> list[str]:
    """Titles that only one of the files has."""
    a, b = ({c.title for c in f.comparisons} for f in (old, new))
    return [f"only in the old file: {t}" for t in sorted(a - b)] + [f"only in the new file: {t}" for t in sorted(b - a)]

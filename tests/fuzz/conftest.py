"""Profiles: ``ci`` by default; ``--hypothesis-profile nightly`` makes more than 20,000 calls and prints the counts."""

from hypothesis import HealthCheck, Phase, settings

from tests.fuzz.outcome import COUNTS

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
common = {"deadline": None, "database": None, "suppress_health_check": SLOW, "phases": [Phase.generate]}
settings.register_profile("ci", max_examples=25, derandomize=True, **common)
settings.register_profile("nightly", max_examples=260, **common)
settings.load_profile("ci")


def pytest_terminal_summary(terminalreporter):
    if not COUNTS:
        return
    total: dict[str, int] = {}
    for (_, outcome), count in COUNTS.items():
        total[outcome] = total.get(outcome, 0) + count
    terminalreporter.write_line(f"fuzz: {sum(total.values())} calls: {total}")
    if sum(total.values()) > 20_000:
        for name in sorted({name for name, _ in COUNTS}):
            terminalreporter.write_line(f"  {name}: { {o: c for (n, o), c in sorted(COUNTS.items()) if n == name} }")

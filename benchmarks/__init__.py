"""Side-by-side benchmarks: one script per question, all through ``harness.py``."""

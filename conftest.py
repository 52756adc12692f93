"""For tests and doctests alike: JAX runs on the CPU, and where it is missing its modules are not collected."""

import importlib.util
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an installed libtpu would search for TPUs

collect_ignore_glob: list[str] = []
if importlib.util.find_spec("jax") is None:
    collect_ignore_glob += ["kernel_index/jax/*"]

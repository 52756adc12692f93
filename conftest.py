"""For tests and doctests alike: JAX runs on the CPU, and modules whose package is missing are not collected."""

import importlib.util
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an installed libtpu would search for TPUs

collect_ignore_glob: list[str] = []
if importlib.util.find_spec("jax") is None:
    collect_ignore_glob += ["kernel_index/jax/*"]
if importlib.util.find_spec("cutlass") is None:  # the language of flash-attn-4
    collect_ignore_glob += ["kernel_index/kernels/attention/dense_attention/fa4_predicates.py"]

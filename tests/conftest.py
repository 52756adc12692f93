"""Shared set-up: one Inductor cache for the suite, a fresh environment for dispatch, no state between tests."""

import os
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "inductor"))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels then run on CPU tensors

import pytest

from kernel_index.core import native
from kernel_index.core.dispatch import Ineligible
from kernel_index.core.force import reload_environment


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """``thorough_if`` becomes ``thorough`` where its rule holds, before ``-m`` reads the marks.

    A test of the ``inductor`` backend is thorough, unless it has a rule of its own: Inductor compiles for seconds what
    ``test_formulas_without_their_compiler`` runs as it is written.
    """
    for item in items:
        rules = [mark.kwargs["when"] for mark in item.iter_markers("thorough_if")]
        named = item.callspec.params if hasattr(item, "callspec") else {}
        if any(when(**named) for when in rules) or (not rules and named.get("backend") == "inductor"):
            item.add_marker("thorough")


def pytest_runtest_setup(item):
    if item.get_closest_marker("native") and (reason := native.machine_why_not()):
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test that asks for ``native`` by name is skipped where this CPU cannot run it, for the contract's reason."""
    try:
        return (yield)
    except (Ineligible, native.CannotRun) as error:
        reason = native.machine_why_not()
        if reason is None or reason not in str(error):
            raise
        pytest.skip(reason)


@pytest.fixture(autouse=True, scope="session")
def _kernels_are_built():
    """``auto`` passes over native kernels that are not built; after a change of a source this builds it again."""
    native.build_all()


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in list(os.environ):
        if name.startswith("KERNEL_INDEX_"):
            monkeypatch.delenv(name)
    reload_environment()
    torch.manual_seed(0)
    yield
    monkeypatch.undo()
    reload_environment()

"""Shared set-up: one Inductor cache for the suite, a fresh environment for dispatch, no state between tests."""

import os
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "inductor"))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels then run on CPU tensors

import pytest
from hypothesis import HealthCheck, settings

from kernel_index.core import native
from kernel_index.core.dispatch import Ineligible
from kernel_index.core.force import reload_environment
from kernel_index.core.inductor import Region
from tests.interpreter import remember_builtins

if os.environ.get("TRITON_INTERPRET") == "1":
    remember_builtins()

# What is drawn may take long on a slow machine: no test is about that.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """``thorough_if`` becomes ``thorough`` where its rule holds, before ``-m`` reads the marks.

    So does what Inductor compiles, unless the test has a rule of its own: to compile a formula takes seconds.
    """
    for item in items:
        rules = [mark.kwargs["when"] for mark in item.iter_markers("thorough_if")]
        if any(when(**item.callspec.params) for when in rules) or (not rules and _compiles(item)):
            item.add_marker("thorough")


def _backend_of(item):
    return item.callspec.params.get("backend") if hasattr(item, "callspec") else None


def _compiles(item) -> bool:
    return _backend_of(item) == "inductor" and item.get_closest_marker("compiled") is not None


@pytest.fixture(autouse=True)
def _formulas_run_as_written(request, monkeypatch):
    """Inductor finds no mistake in a formula: unless a test is marked ``compiled``, its formulas are not compiled."""
    if _backend_of(request.node) == "inductor" and request.node.get_closest_marker("compiled") is None:
        monkeypatch.setattr(Region, "__call__", lambda region, *args: region.function(*args))


def pytest_runtest_setup(item):
    if item.get_closest_marker("native") and (reason := native.machine_why_not()):
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test that asks for ``native`` by name is skipped where this CPU cannot run it, for the contract's reason."""
    try:
        return (yield)
    except (Ineligible, native.CannotRun) as error:
        reason = native.machine_why_not() or (native.NO_BFLOAT16 if native.NO_BFLOAT16 in str(error) else None)
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

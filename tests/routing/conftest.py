"""Fixtures of the routers' tests."""

import pytest

from kernel_index.core import native


@pytest.fixture
def ran(monkeypatch):
    """The native functions that a test called, in order."""
    calls = []

    def counted(source, function, *args):
        calls.append(function)
        return call(source, function, *args)

    call = native.call
    monkeypatch.setattr(native, "call", counted)
    return calls

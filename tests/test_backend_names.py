"""The ``Literal`` type of a ``backend`` parameter names every backend of the op's table."""

import inspect
import typing

import pytest

from kernel_index.core.testing import suites


def names(function):
    parameter = inspect.signature(function).parameters.get("backend")
    literal = parameter is not None and typing.get_origin(parameter.annotation) is typing.Literal
    return typing.get_args(parameter.annotation) if literal else ()


TYPED = [pytest.param(s, id=s.op) for s in suites() if names(s.function)]


@pytest.mark.parametrize("suite", TYPED)
def test_the_type_names_the_table(suite):
    assert {"auto", *(b.name for b in suite.backends)} <= set(names(suite.function))

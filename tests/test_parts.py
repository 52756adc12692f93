"""``--part i/n`` deals the tests out: each of them to one part."""

from types import SimpleNamespace

import pytest

from conftest import pytest_collection_modifyitems


def kept(part, names):
    items = [type("Item", (), {"nodeid": name})() for name in names]
    hook = SimpleNamespace(pytest_deselected=lambda items: None)
    pytest_collection_modifyitems(SimpleNamespace(getoption=lambda _: part, hook=hook), items)
    return [item.nodeid for item in items]


def test_each_test_is_in_one_part():
    names = [f"tests/test_a.py::test[{n}]" for n in range(100)]
    parts = [kept(f"{i}/4", names) for i in range(1, 5)]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert all(parts)
    assert kept("1/1", names) == names


@pytest.mark.parametrize("part", ["0/4", "5/4", "2", "a/b", "1/0"])
def test_a_part_that_is_none(part):
    with pytest.raises(pytest.UsageError, match="i/n"):
        kept(part, ["a"])

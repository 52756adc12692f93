"""The pages say how the C++ kernels come to a machine: by a command, since ``auto`` compiles none."""

import importlib.util
import re

import pytest

from docs import place


@pytest.mark.parametrize("page", ["README.md", "docs/site/install.md", "docs/site/environment.md", "CHANGELOG.md"])
def test_the_page_names_the_command(page):
    text = (place.REPOSITORY / page).read_text()
    assert "kernel-index build" in text
    assert "built on first use" not in text
    assert "`native`) may be compiled" not in text


def test_the_module_that_builds_without_the_command_can_be_run():
    (module,) = re.findall(r"`python -m (kernel_index\S+)`", (place.REPOSITORY / "docs/site/install.md").read_text())
    assert importlib.util.find_spec(f"{module}.__main__"), "another module would do nothing"

"""The pages say how the C++ kernels come to a machine: by a command, since ``auto`` compiles none."""

import pytest

from docs import place


@pytest.mark.parametrize("page", ["README.md", "docs/site/install.md", "docs/site/environment.md", "CHANGELOG.md"])
def test_the_page_names_the_command(page):
    text = (place.REPOSITORY / page).read_text()
    assert "kernel-index build" in text
    assert "built on first use" not in text
    assert "`native`) may be compiled" not in text

"""``python -m kernel_index.cli``: the ``kernel-index`` command."""

from kernel_index.cli.main import main

main()

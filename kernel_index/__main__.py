"""``python -m kernel_index``: the ``kernel-index`` command."""

from kernel_index.cli.main import main

main()

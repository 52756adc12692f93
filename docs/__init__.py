"""The documentation: ``python -m docs`` writes its pages from the tree and from recorded results, and builds the site.

``pages`` writes Markdown: ``kernels`` a page for each kernel, ``reference`` the other public names, ``status`` the
matrix of what was seen (``states`` reads it), ``measured`` plots and tables.  The pages of ``site``, guides and
decisions are written by hand.
``formulas`` and ``links`` work on the built HTML, and ``browser`` opens it.
"""

SOURCE = "https://github.com/kernel-index/kernel-index"
"""Where the repository is: every absolute link of the README and the site begins with it."""

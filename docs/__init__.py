"""The documentation: ``python -m docs`` writes its pages from the tree and from recorded results, and builds the site.

``states`` reads the results, ``pages`` writes Markdown, ``text`` turns docstrings and links into it, ``links`` checks
the built HTML.  Guides and decisions are written by hand; every table of what runs where is not.
"""

"""A small hybrid-ready language model that trains on the kernels of the index."""

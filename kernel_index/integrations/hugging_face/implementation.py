"""The name under which a configuration asks for our attention, and the attention that the model had before."""

from typing import Any

NAME = "kernel_index"
PYTORCHS = "sdpa"


class Implementation(str):
    """``"kernel_index"``, with ``own``: the name of the attention that serves the calls which ours does not take.

    Transformers looks the name up and compares it; it does not see ``own``, which no saved configuration holds.
    """

    own: str

    @staticmethod
    def over(own: str) -> str:
        if own == PYTORCHS:
            return NAME  # what ``own_implementation`` supposes: some versions of Dynamo know no kind of str but str
        found = Implementation(NAME)
        found.own = own
        return found


def own_implementation(config: Any) -> str:
    """What the model of this configuration ran before ``apply``; PyTorch's where it never had another."""
    return getattr(getattr(config, "_attn_implementation", None), "own", PYTORCHS)

"""MoBA over whole sequences: the router, then the block-sparse core."""

from torch import Tensor

from kernel_index.core.dispatch import Backend, Choice
from kernel_index.kernels.sparse.moba_block_sparse.contract import MobaCall


def attend(core: Backend, call: MobaCall, router: Choice) -> tuple[Tensor, Tensor]:
    """``core`` and ``router`` were chosen before: nothing is chosen here.  A router has no gradient."""
    selected = router.run_inside(call.routing)
    return core.run(call.on_core(selected.indices, selected.valid))

"""Other libraries of kernels, and why a table has no row of theirs."""

from dataclasses import dataclass

import torch

from kernel_index.core.target import has_package


@dataclass(frozen=True)
class Peer:
    """``package`` is what Python imports, ``distribution`` what pip installs, ``timed_by`` what times it."""

    name: str
    package: str
    distribution: str
    timed_by: str = ""

    def why_not(self) -> str:
        """Why it is not a contender of the questions here, as a fixed sentence."""
        if not torch.cuda.is_available():
            return "needs a CUDA device: its kernels have no CPU backend"
        if not has_package(self.package):
            return f"needs the {self.package} package (pip install {self.distribution})"
        return f"timed by {self.timed_by}" if self.timed_by else "no question compares with it yet"


PEERS = (
    Peer("Liger-Kernel", "liger_kernel", "liger-kernel", "python -m benchmarks.gpu"),
    Peer("flash-linear-attention", "fla", "flash-linear-attention"),
    Peer("FlashAttention", "flash_attn", "flash-attn-4"),
)


def absent() -> dict[str, str]:
    """Each peer and its reason."""
    return {peer.name: peer.why_not() for peer in PEERS}

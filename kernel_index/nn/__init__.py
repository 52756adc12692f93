"""Layers and blocks that call the kernels through their public functions."""

from kernel_index.nn.attention import Attention
from kernel_index.nn.block import BlockBranch, HybridBlock, TransformerBlock
from kernel_index.nn.embedding import Embedding
from kernel_index.nn.experts import Experts, Router, Routing
from kernel_index.nn.hyper_connections import HyperConnectedBlocks, HyperConnections
from kernel_index.nn.linear import Linear
from kernel_index.nn.mixer import Mixer
from kernel_index.nn.mla import MLA, PagedLatentCache
from kernel_index.nn.mlp import SquaredReLUMLP, SwiGLUMLP
from kernel_index.nn.residual import Branch, ResidualRMSNorm
from kernel_index.nn.sparse_attention import ExactTokenCache, SparseAttention
from kernel_index.nn.state_space import Mamba2, MixerState

__all__ = [
    "MLA",
    "Attention",
    "BlockBranch",
    "Branch",
    "Embedding",
    "ExactTokenCache",
    "Experts",
    "HybridBlock",
    "HyperConnectedBlocks",
    "HyperConnections",
    "Linear",
    "Mamba2",
    "Mixer",
    "MixerState",
    "PagedLatentCache",
    "ResidualRMSNorm",
    "Router",
    "Routing",
    "SparseAttention",
    "SquaredReLUMLP",
    "SwiGLUMLP",
    "TransformerBlock",
]

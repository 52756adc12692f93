"""Layers and blocks that call the kernels through their public functions; no kernel logic lives here."""

from kernel_index.nn.attention import Attention
from kernel_index.nn.block import TransformerBlock
from kernel_index.nn.hyper_connections import HyperConnectedBlocks, HyperConnections
from kernel_index.nn.mlp import SquaredReLUMLP
from kernel_index.nn.residual import ResidualRMSNorm

__all__ = [
    "Attention",
    "HyperConnectedBlocks",
    "HyperConnections",
    "ResidualRMSNorm",
    "SquaredReLUMLP",
    "TransformerBlock",
]

"""An embedding whose gradient is added up in a fixed order."""

from torch import Tensor, nn

import kernel_index as ki


class Embedding(nn.Embedding):
    """``torch.nn.Embedding``; on a GPU by ``ki.gather_rows``, since PyTorch's gradient there differs from call to call.

    With ``padding_idx``, ``max_norm``, ``scale_grad_by_freq`` or ``sparse`` it is PyTorch's.

    >>> import torch
    >>> Embedding(3, 2)(torch.tensor([[0, 2]])).shape
    torch.Size([1, 2, 2])
    """

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Embedding has
        rare = self.padding_idx is not None or self.max_norm is not None or self.scale_grad_by_freq or self.sparse
        if rare or not input.is_cuda:
            return super().forward(input)
        return ki.gather_rows(self.weight[:, None], input.flatten()).view(*input.shape, self.embedding_dim)

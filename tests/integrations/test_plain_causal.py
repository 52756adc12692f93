"""A causal call without padding under ``torch.compile``: PyTorch's causal attention, without a dense mask."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

import kernel_index as ki
from kernel_index.proofs.errors import floor, relative_error
from tests.integrations.tiny_models import Known, model_of

PLAIN = {}
POSITIONS = {"position_ids": torch.arange(9).expand(2, 9)}
PACKED = {"position_ids": torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]).expand(2, 9)}
PADDED = {"attention_mask": torch.ones(2, 9, dtype=torch.long).index_fill(1, torch.tensor([7, 8]), 0)}


def ids():
    return torch.randint(3, 80, (2, 9), generator=torch.Generator().manual_seed(1))


def compiled_call(model, more):
    """Logits, and whether each attention in the graph is asked for a causal one instead of a mask."""
    causal = []

    def look(graph, inputs):
        calls = [n for n in graph.graph.nodes if n.target is torch.nn.functional.scaled_dot_product_attention]
        causal.extend(n.kwargs["is_causal"] is True and n.kwargs["attn_mask"] is None for n in calls)
        return graph.forward

    torch._dynamo.reset()
    out = torch.compile(model, backend=look)(input_ids=ids(), use_cache=False, **more).logits
    torch._dynamo.reset()
    return out, causal


@pytest.mark.parametrize("more", [PLAIN, POSITIONS, PACKED, PADDED], ids=["plain", "positions", "packed", "padded"])
def test_a_compiled_call_is_that_of_the_model(more):
    stock = model_of(Known("decoder", "llama"))
    patched = copy.deepcopy(stock)
    report = ki.transformers.apply(patched)
    expected = stock(input_ids=ids(), use_cache=False, **more).logits
    found, causal = compiled_call(patched, more)
    assert causal == [more is PLAIN] * 2
    real = more.get("attention_mask", torch.ones(2, 9)).bool()
    assert relative_error(found.detach()[real], expected.detach()[real]) <= 16 * floor(torch.float32)
    report.undo()
    assert type(patched.model) is type(stock.model)


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_a_model_with_windows_makes_its_own_masks(name):
    stock = model_of(Known("decoder", name))
    patched = copy.deepcopy(stock)
    ki.transformers.apply(patched)
    expected = stock(input_ids=ids(), use_cache=False).logits
    found, _ = compiled_call(patched, PLAIN)
    assert relative_error(found.detach(), expected.detach()) <= 16 * floor(torch.float32)

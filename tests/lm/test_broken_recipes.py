"""The check can fail: each recipe of a CPU is broken once, and an axis of ``rollout-check`` turns red."""

import pytest
import torch

from kernel_index.core import document_attention
from kernel_index.kernels.experts.grouped_product import torch_op_rows as grouped
from kernel_index.lm import model, rollout_check
from kernel_index.lm.one_order import as_given
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.nn import document_scan, mla, residual
from kernel_index.nn import linear as layers
from kernel_index.nn.residual import invariant_norm
from kernel_index.routing.block_router import documents as routing
from tests.lm.test_rollout_check import FORMS

pytestmark = pytest.mark.native
AXES = ("batch size", "packed or alone", "cached decoding", "chunked prefill")
TOKENS = 900


def pytorchs_linear(monkeypatch):
    """Its kernel follows the number of rows."""
    monkeypatch.setattr(layers.Linear, "forward", torch.nn.Linear.forward)


def segments_from_the_rows_start(monkeypatch):
    monkeypatch.setattr(
        MaskContract, "row_origins", lambda self, sizes: torch.zeros(1, sizes.queries, dtype=torch.int32)
    )


def a_scale_that_follows_the_number_of_queries(monkeypatch):
    """As an algorithm would that takes other parts for few queries: the last bit of their scores."""
    attend = document_attention.document_attention.launch

    def launch(q, *rest):
        return attend(q * (1 + 2**-20) if q.shape[1] < 16 else q, *rest)

    monkeypatch.setattr(document_attention.document_attention, "launch", launch)


def products_of_the_scan_that_know_how_many_documents_there_are(monkeypatch):
    multiply = document_scan.batch_product
    monkeypatch.setattr(
        document_scan, "batch_product", lambda left, right: multiply(left * (1 + 2**-22 * (len(left) == 1)), right)
    )


def the_absorbed_projection(monkeypatch):
    monkeypatch.setattr(mla, "is_invariant", lambda: False)


def other_blocks_for_few_queries(monkeypatch):
    route = routing._best

    def best(scores, first, current, options):
        return route(scores.flip(2) if len(scores) < 16 else scores, first, current, options)

    monkeypatch.setattr(routing, "_best", best)


def a_norm_that_follows_the_rows_number(monkeypatch):
    def normed(stream, weight, eps):
        number = torch.arange(stream.shape[1])[:, None]
        return invariant_norm(stream * (1 + 2**-22 * (number % 2)), weight, eps)

    monkeypatch.setattr(residual, "invariant_norm", normed)


def an_expert_that_knows_its_load(monkeypatch):
    multiply = grouped.product.launch

    class Product:
        @staticmethod
        def launch(x, *rest):
            return multiply(x * (1 + 2**-22) if len(x) < 100 else x, *rest)

    monkeypatch.setattr(grouped, "product", Product)


BROKEN = {
    "linear": ("A, fp32 stream, SwiGLU", pytorchs_linear),
    "attention": ("A, plain stream, squared ReLU", a_scale_that_follows_the_number_of_queries),
    "scan": ("M", products_of_the_scan_that_know_how_many_documents_there_are),
    "latent": ("L", the_absorbed_projection),
    "routing": ("S, MoBA", other_blocks_for_few_queries),
    "experts": ("E, sigmoid, shared", an_expert_that_knows_its_load),
    "norm": ("A, fp32 stream, SwiGLU", a_norm_that_follows_the_rows_number),
    "selected blocks": ("S, MoBA", segments_from_the_rows_start),
    "selected tokens": ("S, exact tokens", segments_from_the_rows_start),
}


@pytest.mark.thorough_if(when=lambda broken: broken != "linear")
@pytest.mark.parametrize("broken", BROKEN)
def test_the_table_turns_red(broken, monkeypatch):
    form, break_it = BROKEN[broken]
    break_it(monkeypatch)
    found = rollout_check.check(FORMS[form](), TOKENS, axes=AXES)
    assert not any(f.refused for f in found.values())
    assert any(f.differing for f in found.values())


def test_gradients_follow_the_packing_where_a_batch_keeps_its_own(monkeypatch):
    """The log-probabilities do not: what differs are sums over tokens."""
    monkeypatch.setattr(model, "in_one_order", as_given)
    found = rollout_check.check(FORMS["A, fp32 stream, SwiGLU"](), TOKENS, axes=("gradients", "packed or alone"))
    assert found["packed or alone"].is_exact
    assert found["gradients"].differing > 0

"""A configuration that no model can have is refused where it is made, whoever made it."""

import json
import re
from dataclasses import fields, replace

import pytest

from kernel_index.lm.config import PRESETS, ExpertLayer, Latent, ModelConfig, Sparse, StateSpace

NANO = PRESETS["nano"].model
SIZES = ["dim", "heads", "kv_heads", "head_dim", "context"]
PARTS = {"sparse": Sparse, "latent": Latent, "state_space": StateSpace, "experts": ExpertLayer}
LEAST = {
    ModelConfig: {**dict.fromkeys(SIZES, 1), "hidden": 0, "vocab": 257},
    Sparse: dict.fromkeys(("block", "topk", "tokens", "index_heads", "index_dim"), 1),
    Latent: {"latent": 1, "rope": 2},
    StateSpace: dict.fromkeys(("heads", "head_dim", "state", "chunk"), 1),
    ExpertLayer: {"count": 1, "topk": 1, "hidden": 1, "shared": 0},
}
SMALL = [(kind, name, least) for kind, names in LEAST.items() for name, least in names.items()]


def made(kind, **changes):
    return replace(NANO, **changes) if kind is ModelConfig else kind(**changes)


@pytest.mark.parametrize(("kind", "name", "least"), SMALL)
def test_the_least_of_every_size(kind, name, least):
    assert getattr(made(kind, **{name: least}), name) == least
    for value in (least - 1, -8):
        with pytest.raises(ValueError, match=f"^{name} must be at least {least}, got {value}$"):
            made(kind, **{name: value})
    with pytest.raises(TypeError, match=f"^{name} must be an integer, got float$"):
        made(kind, **{name: 8.0})


@pytest.mark.parametrize("kind", LEAST)
def test_no_size_is_left_out(kind):
    assert {f.name for f in fields(kind) if f.type in ("int", int)} - {"padded_vocab"} == set(LEAST[kind])


REFUSED = [
    ({"dropout": -0.1}, "dropout must be at least 0, got -0.1"),
    ({"dropout": 1.5}, "dropout must be at most 1, got 1.5"),
    ({"ahead": -1.0}, "ahead must be at least 0, got -1.0"),
    ({"z_loss": float("nan")}, "z_loss must be finite, got nan"),
    ({"rope_base": 0.0}, "rope_base must be above 0, got 0.0"),
    ({"rope_base": "x"}, "rope_base must be a number, got str"),
    ({"windows": (-3, None)}, "windows must be at least 0, got -3"),
    ({"windows": (2.5, None)}, "windows must be an integer, got float"),
    ({"windows": "ab"}, "windows must be a tuple, got 'ab'"),
    ({"windows": 5}, "windows must be a tuple, got 5"),
    ({"pattern": 5}, "pattern must be of type str, got 5"),
    ({"pattern": ("A", "A")}, "pattern must be of type str, got ('A', 'A')"),
    ({"padded_vocab": 256}, "padded_vocab must be at least vocab (257), got 256"),
    ({"residual": 5}, "residual must be one of 'fp32', 'plain', 'mhc', 'mhc-plain', got 5"),
    ({"latent": 5}, "atent must be "),
]
PART_REFUSED = [
    ("sparse", {"kinds": 5}, "kinds must be made of exact_token, moba, clustered, nsa, got 5"),
    ("sparse", {"kinds": ("x",)}, "kinds must be made of exact_token, moba, clustered, nsa, got ('x',)"),
    ("sparse", {"kinds": "moba"}, "kinds must be made of exact_token, moba, clustered, nsa, got moba"),
    ("sparse", {"hierarchy": "x"}, "hierarchy must be a pair or None, got 'x'"),
    ("sparse", {"hierarchy": (1, 2, 3)}, "hierarchy must be a pair or None, got (1, 2, 3)"),
    ("sparse", {"hierarchy": (0, 1)}, "hierarchy must be at least 1, got 0"),
    ("sparse", {"report_unions": 1}, "report_unions must be True or False, got int"),
    ("latent", {"rope": 3}, "rope must be even, got 3"),
    ("experts", {"scores": "x"}, "scores must be one of 'sigmoid', 'softmax', got 'x'"),
    ("experts", {"balance": -1.0}, "balance must be at least 0, got -1.0"),
]


def read(**changes):
    """As from somebody's file."""
    return ModelConfig.from_json(json.loads(json.dumps({**NANO.to_json(), **changes})))


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_else_no_model_can_have(changes, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        replace(NANO, **changes)
    with pytest.raises((TypeError, ValueError), match=f"^{next(iter(changes))} must be|Latent must be"):
        read(**changes)


@pytest.mark.parametrize(("part", "changes", "message"), PART_REFUSED)
def test_what_else_no_part_can_have(part, changes, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        PARTS[part](**changes)
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        read(**{part: changes})


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_configuration(preset):
    model = PRESETS[preset].model
    assert ModelConfig.from_json(json.loads(json.dumps(model.to_json()))) == model

"""``rope_tables`` against formulas written once more, scalar by scalar, from the papers."""

import math
from types import MappingProxyType

import pytest
import torch

import kernel_index as ki

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.01 * i for i in range(8)],
    "long_factor": [1.0 + 4.0 * i for i in range(8)],
    "original_max_position_embeddings": 4096,
    "factor": 32.0,
}


def plain(i, dim, base):
    return base ** (-2.0 * i / dim)


def yarn(i, dim, base, factor, original, fast=32.0, slow=1.0, truncate=True):
    """Peng et al. 2023, section 3.2, with the ramp over pair indices that the released models use."""

    def pair_of(turns):  # solve original · base**(−2i/dim) = 2π · turns for i
        return dim / 2 * math.log(original / (2 * math.pi * turns), base)

    low, high = pair_of(fast), pair_of(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    gamma = 1.0 if i <= low else 0.0 if i >= high else 1 - (i - low) / (high - low)
    f = plain(i, dim, base)
    return gamma * f + (1 - gamma) * f / factor


def llama3(i, dim, base, factor, low, high, original):
    """The Llama 3.1 release: three ranges of wavelength."""
    f = plain(i, dim, base)
    wavelength = 2 * math.pi / f
    if wavelength < original / high:
        return f
    if wavelength > original / low:
        return f / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * f / factor + smooth * f


def expected(positions, frequencies, amplitude=1.0):
    angles = [[p * f for f in frequencies] for p in positions]
    cos = torch.tensor([[amplitude * math.cos(a) for a in row] for row in angles], dtype=torch.float64)
    sin = torch.tensor([[amplitude * math.sin(a) for a in row] for row in angles], dtype=torch.float64)
    return cos[None, :, None], sin[None, :, None]


POSITIONS = (0, 1, 17, 4095, 8192, 131071, 16777217, -5)
FORMULAS = {
    "plain": (64, 10000.0, None, plain, (), 1.0),
    "default": (64, 10000.0, {"rope_type": "default"}, plain, (), 1.0),
    "base": (128, 500000, None, plain, (), 1.0),
    "one pair": (2, 10000.0, None, plain, (), 1.0),
    "linear": (64, 10000.0, {"type": "linear", "factor": 4}, lambda *a: plain(*a) / 4, (), 1.0),
    "yarn": (64, 10000.0, YARN, yarn, (4.0, 4096), 0.1 * math.log(4) + 1),
    "yarn qwen": (
        128, 1e6, YARN | {"original_max_position_embeddings": 32768}, yarn, (4.0, 32768), 0.1 * math.log(4) + 1,
    ),
    "yarn deepseek": (
        64, 10000.0, YARN | {"factor": 40, "mscale": 0.707, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1},
        yarn, (40, 4096), (0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1),
    ),
    "yarn mscale alone": (64, 10000.0, YARN | {"mscale": 0.7}, yarn, (4.0, 4096), 0.1 * math.log(4) + 1),
    "yarn options": (
        64, 10000.0, YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.25, "truncate": False},
        yarn, (4.0, 4096, 8.0, 2.0, False), 1.25,
    ),
    "yarn factor 1": (64, 10000.0, YARN | {"factor": 1}, yarn, (1.0, 4096), 1.0),
    "yarn empty ramp": (4, 1e30, YARN | {"beta_fast": 1.0}, yarn, (4.0, 4096, 1.0), 0.1 * math.log(4) + 1),
    "llama3": (128, 500000.0, LLAMA3, llama3, (8.0, 1.0, 4.0, 8192), 1.0),
    "llama3.2": (64, 500000.0, LLAMA3 | {"factor": 32.0}, llama3, (32.0, 1.0, 4.0, 8192), 1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_tables_are_the_published_formulas(name):
    dim, base, scaling, formula, more, amplitude = FORMULAS[name]
    frequencies = [formula(i, dim, float(base), *more) for i in range(dim // 2)]
    tables = ki.rope_tables(torch.tensor(POSITIONS), dim, base, scaling=scaling)
    for actual, exact in zip(tables, expected(POSITIONS, frequencies, amplitude), strict=True):
        assert actual.dtype == torch.float32
        assert actual.shape == (1, len(POSITIONS), 1, dim // 2)
        # Angles reach 1.7e7 radians, where float64 itself is good to 4e-9.
        torch.testing.assert_close(actual.double(), exact, rtol=torch.finfo(torch.float32).eps, atol=2e-8)


def test_the_ramps_really_blend():
    """Each stretched table must hold kept, blended and stretched pairs, or the tests above show little."""
    for scaling, dim, base in ((YARN, 64, 1e4), (LLAMA3, 128, 5e5)):
        from kernel_index.kernels.attention.fused_rope_qk.tables import frequencies

        stretched, _ = frequencies(dim, base, scaling, torch.device("cpu"))
        ratio = stretched / frequencies(dim, base, None, torch.device("cpu"))[0]
        low = 1 / scaling["factor"]
        assert ratio[0] == 1
        assert ratio[-1] == pytest.approx(low)
        assert ((ratio > low * 1.01) & (ratio < 0.99)).sum() >= 3


def test_rows_with_positions_of_their_own():
    positions = torch.tensor([[0, 1, 2, 0], [5, 6, 7, 8]], dtype=torch.int32)
    tables = ki.rope_tables(positions, 8)
    assert tables.cos.shape == (2, 4, 1, 4)
    for row in range(2):
        assert torch.equal(tables.cos[row], ki.rope_tables(positions[row], 8).cos[0])
        assert torch.equal(tables.sin[row], ki.rope_tables(positions[row], 8).sin[0])
    q = torch.randn(2, 4, 2, 8)
    assert ki.fused_rope_qk(q, q, *tables).q.shape == q.shape


def test_none_is_absent_and_any_mapping_will_do():
    spelled = YARN | {"attention_factor": None, "beta_fast": None, "type": "yarn", "rope_theta": 10000.0}
    actual = ki.rope_tables(torch.arange(9), 16, scaling=MappingProxyType(spelled))
    assert torch.equal(actual.cos, ki.rope_tables(torch.arange(9), 16, scaling=YARN).cos)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({}, r"scaling\['rope_type'\] must be one of 'default', 'linear', 'dynamic', 'yarn', .*, got None"),
        ({"rope_type": "ntk", "factor": 2.0}, r"scaling\['rope_type'\] must be one of .* got 'ntk'"),
        ({"rope_type": "linear"}, "scaling must hold 'factor' for rope_type 'linear', got only 'rope_type'"),
        ({"rope_type": "linear", "factor": None}, "scaling must hold 'factor'"),
        ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, r"scaling\['type'\] must be rope_type 'linear'"),
        ({"rope_type": "linear", "factor": 0.5}, r"scaling\['factor'\] must be at least 1, got 0.5"),
        ({"rope_type": "linear", "factor": float("nan")}, r"scaling\['factor'\] must be finite, got nan"),
        (
            {"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0},
            "scaling must hold only 'factor' .* got 'beta_fast'",
        ),
        ({"rope_type": "default", "factor": 2.0}, "scaling must hold only rope_type .* got 'factor'"),
        (YARN | {"mscale_all_dims": 1.0}, "scaling must hold only .* got 'mscale_all_dims'"),
        (YARN | {"rope_theta": 5e5}, r"scaling\['rope_theta'\] must be base 10000.0, got 500000.0"),
        (YARN | {"original_max_position_embeddings": 0}, "original_max_position_embeddings'] must be at least 1"),
        (YARN | {"attention_factor": 0.0}, r"scaling\['attention_factor'\] must be positive, got 0.0"),
        (YARN | {"mscale": -1.0}, r"scaling\['mscale'\] must be at least 0, got -1.0"),
        (YARN | {"beta_fast": 0.5}, r"scaling\['beta_fast'\] must be at least beta_slow 1.0, got 0.5"),
        (YARN | {"beta_slow": 64.0}, r"scaling\['beta_fast'\] must be at least beta_slow 64.0, got 32"),
        (LLAMA3 | {"high_freq_factor": 1.0}, r"scaling\['high_freq_factor'\] must be greater than low_freq_factor 1.0"),
        ({k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}, "scaling must hold 'low_freq_factor'"),
        ({"rope_type": "default", "partial_rotary_factor": 1.5}, "partial_rotary_factor'] must be at most 1, got 1.5"),
        ({"rope_type": "default", "partial_rotary_factor": 0.0}, "partial_rotary_factor'] must be positive, got 0.0"),
        ({"rope_type": "default", "partial_rotary_factor": 0.2}, "must make an even number of dim 16, .* got 3"),
        (
            LONGROPE | {"short_factor": [1.0]},
            r"scaling\['short_factor'\] must hold 8 numbers, one for each pair, got 1",
        ),
        (LONGROPE | {"long_factor": [-1.0] * 8}, r"scaling\['long_factor'\]\[0\] must be positive, got -1.0"),
        (LONGROPE | {"factor": None}, "scaling must hold 'attention_factor', 'factor' or 'max_position_embeddings'"),
    ],
)
def test_a_wrong_scaling_is_an_error(scaling, message):
    with pytest.raises(ValueError, match=message):
        ki.rope_tables(torch.arange(4), 16, scaling=scaling)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (([0, 1], 8), TypeError, "positions must be a torch.Tensor, got list"),
        ((torch.arange(4.0), 8), TypeError, "positions must be an integer tensor, got torch.float32"),
        ((torch.ones(4, dtype=torch.bool), 8), TypeError, "positions must be an integer tensor, got torch.bool"),
        ((torch.tensor(3), 8), ValueError, r"positions must be \[T\] or \[B, T\], got shape \(\)"),
        ((torch.ones(1, 2, 3, dtype=torch.int64), 8), ValueError, "positions must be"),
        ((torch.arange(4), 7), ValueError, "dim must be even, got 7"),
        ((torch.arange(4), 0), ValueError, "dim must be at least 2, got 0"),
        ((torch.arange(4), 8.0), TypeError, "dim must be an integer, got float"),
        ((torch.arange(4), 8, 1.0), ValueError, "base must be greater than 1, got 1.0"),
        ((torch.arange(4), 8, "10000"), TypeError, "base must be a number, got str"),
        ((torch.arange(4), 8, 1e4, [("rope_type", "linear")]), TypeError, "scaling must be a mapping .* got list"),
        ((torch.arange(4), 7, 1e4, YARN), ValueError, "dim must be even, got 7"),
        ((torch.arange(4), 8, 1e4, LONGROPE | {"long_factor": 2.0}), TypeError, "must be a list of numbers, got float"),
        ((torch.arange(4), 8, 1e4, YARN | {"truncate": 1}), TypeError, r"scaling\['truncate'\] must be True or False"),
        (
            (torch.arange(4), 8, 1e4, YARN | {"factor": "4"}),
            TypeError,
            r"scaling\['factor'\] must be a number, got str",
        ),
    ],
)
def test_a_wrong_argument_is_an_error(args, error, message):
    with pytest.raises(error, match=message):
        ki.rope_tables(*args)


MODELS = {
    "llama 3.1": (128, LLAMA3 | {"rope_theta": 500000.0}, {"max_position_embeddings": 131072}),
    "llama 3.2": (64, LLAMA3 | {"factor": 32.0, "rope_theta": 500000.0}, {"max_position_embeddings": 131072}),
    "qwen 2.5 long": (
        128, YARN | {"original_max_position_embeddings": 32768, "rope_theta": 1e6}, {"max_position_embeddings": 131072},
    ),
    "gpt-oss": (
        64, YARN | {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "rope_theta": 150000.0},
        {"max_position_embeddings": 131072},
    ),
    "deepseek v3": (
        64, YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 10000.0},
        {"max_position_embeddings": 163840},
    ),
    "gemma 3": (256, {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, {}),
    "linear, partial": (
        80, {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0, "partial_rotary_factor": 0.4}, {},
    ),
    "yarn, partial": (128, YARN | {"rope_theta": 1e6, "partial_rotary_factor": 0.5}, {}),
    "dynamic": (128, {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}, {"max_position_embeddings": 2048}),
    "dynamic, partial": (
        64, {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 25000.0, "partial_rotary_factor": 0.5},
        {"max_position_embeddings": 4096},
    ),
    "phi 3": (
        96, LONGROPE | {n: [1.0 + a * i for i in range(48)] for n, a in (("short_factor", 0.02), ("long_factor", 1.3))}
        | {"rope_theta": 10000.0}, {"max_position_embeddings": 131072},
    ),
    "phi 4 mini, factor from the lengths": (
        128, LONGROPE | {n: [1.0 + a * i for i in range(48)] for n, a in (("short_factor", 0.0), ("long_factor", 0.9))}
        | {"rope_theta": 10000.0, "partial_rotary_factor": 0.75, "factor": None}, {"max_position_embeddings": 131072},
    ),
    "longrope, attention factor": (16, LONGROPE | {"rope_theta": 1e4, "attention_factor": 1.19}, {}),
    "gemma 4": (512, {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}, {}),
    "proportional, factor": (
        128, {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5, "factor": 8.0}, {},
    ),
}  # fmt: skip
NEED_THE_CONFIGURATION = ("dynamic", "dynamic, partial", "phi 4 mini, factor from the lengths")


@pytest.mark.parametrize("seq_len", [None, 1000, 6000, 100000])
@pytest.mark.parametrize("name", MODELS)
def test_a_rope_parameters_mapping_as_transformers_has_it(name, seq_len):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    head, parameters, more = MODELS[name]
    config = transformers.LlamaConfig(
        hidden_size=4 * head, num_attention_heads=4, head_dim=head, rope_parameters=dict(parameters), **more
    )
    inverse, amplitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=seq_len)
    mapping = config.rope_parameters | (more if name in NEED_THE_CONFIGURATION else {})
    positions = torch.tensor([0, 1, 17, 300, 4095])
    tables = ki.rope_tables(positions, head, None, mapping, seq_len=seq_len)
    for found, of in zip(tables, (torch.cos, torch.sin), strict=True):
        exact = of(positions.double()[:, None] * inverse.double()) * amplitude
        assert found.shape == (1, 5, 1, len(inverse))
        torch.testing.assert_close(found[0, :, 0].double(), exact, rtol=1e-5, atol=2e-3)  # float32 angles up to 4095
    torch.testing.assert_close(tables.sin[0, 1, 0].double(), torch.sin(inverse.double()) * amplitude, rtol=1e-5, atol=0)


def test_the_default_type_with_a_partial_factor_is_that_of_the_models():
    transformers = pytest.importorskip("transformers")
    from transformers.models.glm.modeling_glm import GlmRotaryEmbedding

    parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = transformers.GlmConfig(
        hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, rope_parameters=parameters
    )
    cos, sin = GlmRotaryEmbedding(config)(torch.zeros(1), torch.arange(9)[None])
    tables = ki.rope_tables(torch.arange(9), 64, None, config.rope_parameters)
    assert tables.cos.shape[-1] == 16
    torch.testing.assert_close(tables.cos[0, :, 0], cos[0, :, :16])
    torch.testing.assert_close(tables.sin[0, :, 0], sin[0, :, :16])


def test_the_base_comes_from_the_mapping_where_none_is_given():
    given = ki.rope_tables(torch.arange(5), 16, 5e5, LLAMA3)
    read = ki.rope_tables(torch.arange(5), 16, None, LLAMA3 | {"rope_theta": 5e5})
    assert torch.equal(given.cos, read.cos)
    for scaling in (None, LLAMA3, LLAMA3 | {"rope_theta": None}):
        with pytest.raises(ValueError, match="base must be given where scaling holds no 'rope_theta', got None"):
            ki.rope_tables(torch.arange(5), 16, None, scaling)
    with pytest.raises(ValueError, match=r"scaling\['rope_theta'\] must be greater than 1, got 0.5"):
        ki.rope_tables(torch.arange(5), 16, None, LLAMA3 | {"rope_theta": 0.5})


def test_dynamic_needs_the_original_length_where_the_sequence_has_one():
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    plain_tables = ki.rope_tables(torch.arange(5), 16)
    assert torch.equal(ki.rope_tables(torch.arange(5), 16, scaling=dynamic).cos, plain_tables.cos)
    with pytest.raises(
        ValueError, match=r"scaling must hold 'original_max_position_embeddings' or .* where seq_len is"
    ):
        ki.rope_tables(torch.arange(5), 16, scaling=dynamic, seq_len=4096)
    a, b = (ki.rope_tables(torch.arange(5), 16, scaling=dynamic | {name: 2048}, seq_len=4096)
            for name in ("original_max_position_embeddings", "max_position_embeddings"))  # fmt: skip
    assert torch.equal(a.cos, b.cos)
    assert not torch.equal(a.cos, plain_tables.cos)


@pytest.mark.thorough_if(when=lambda scaling: scaling is not YARN)
@pytest.mark.parametrize("scaling", [None, YARN, LLAMA3], ids=["plain", "yarn", "llama3"])
def test_one_graph_with_the_rotation_over_several_lengths(scaling):
    def layer(q, k, positions):
        return tuple(ki.fused_rope_qk(q, k, *ki.rope_tables(positions, 16, scaling=scaling)))

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (9, 13, 21, 9):
        q, k = torch.randn(2, n, 4, 16), torch.randn(2, n, 2, 16)
        for a, e in zip(compiled(q, k, torch.arange(n)), layer(q, k, torch.arange(n)), strict=True):
            torch.testing.assert_close(a, e)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_longrope_of_one_position_has_no_factor_of_its_own():
    scaling = LONGROPE | {"original_max_position_embeddings": 1}
    with pytest.raises(ValueError, match=r"'\] must be at least 2 without an attention_factor, got 1"):
        ki.rope_tables(torch.arange(4), 16, scaling=scaling)
    assert ki.rope_tables(torch.arange(4), 16, scaling=scaling | {"attention_factor": 1.0})[0].isfinite().all()

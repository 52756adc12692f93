"""The vectors under the native kernels, in each form that this CPU can run, beside PyTorch and plain sums."""

import math

import pytest
import torch

from kernel_index.core import native
from kernel_index.core.native import build
from kernel_index.core.target import has_bfloat16_products, vector_instructions

SOURCE = """
// For each n of [0, LANES]: the first n elements are loaded, and stored behind others that stay as they are.
template <typename T>
void parts(const T* x, T* y) {
  for (int64_t n = 0; n <= LANES; ++n, y += 2 * LANES) {
    store(y, load(x, n), n);
    store(y + LANES, load(x, n));
  }
}

extern "C" {
void parts_float32(const int64_t*, const float* x, float* y) { parts(x, y); }
void parts_bfloat16(const int64_t*, const BFloat16* x, BFloat16* y) { parts(x, y); }
void rounded(const int64_t* n, const float* x, BFloat16* y) {
  for (int64_t i = 0; i < n[0]; i += LANES) store(y + i, Vec::loadu(x + i));
}
void exponentials(const int64_t* n, const float* x, float* y, float* precise) {
  for (int64_t i = 0; i < n[0]; i += LANES)
    exponential(Vec::loadu(x + i), BFloat16()).store(y + i), exponential(Vec::loadu(x + i), 0.f).store(precise + i);
}
void transposed(const int64_t*, const float* x, float* y) {
  Vec square[LANES];
  for (int64_t i = 0; i < LANES; ++i) square[i] = Vec::loadu(x + i * LANES);
  transpose(square);
  for (int64_t i = 0; i < LANES; ++i) square[i].store(y + i * LANES);
}
void reduced(const int64_t*, const float* x, float* y) {
  y[0] = sum_of(Vec::loadu(x)), y[1] = max_of(Vec::loadu(x));
}
void chosen(const int64_t* n, const int32_t* start, const int32_t* end, int32_t* y) {
  float lanes[3][LANES];
  select(outside(n[0], start, end), Vec(0.f), Vec(1.f)).store(lanes[0]);
  select(lanes_from(n[0]), Vec(0.f), Vec(1.f)).store(lanes[1]);
  select(lanes_of(n[0]), Vec(0.f), Vec(1.f)).store(lanes[2]);
  for (int64_t i = 0; i < 3 * LANES; ++i) y[i] = lanes[i / LANES][i % LANES];
}
void larger_and_positive(const int64_t*, const float* a, const float* b, float* y) {
  larger(Vec::loadu(a), Vec::loadu(b)).store(y), positive(Vec::loadu(a)).store(y + LANES);
}
void product_float32(const int64_t* n, const float* a, const float* b, float* c) {
  MatrixUnits held;
  product(n[0], n[1], n[2], a, b, c, n[3], n[4], n[5]);
}
void product_bfloat16(const int64_t* n, const BFloat16* a, const BFloat16* b, float* c) {
  MatrixUnits held;
  product(n[0], n[1], n[2], a, b, c, n[3], n[4], n[5]);
}
}
"""

KINDS = {"AVX512": ("AVX512", "AVX2"), "AVX2": ("AVX2",)}.get(vector_instructions() or "", ())

pytestmark = pytest.mark.skipif(native.machine_why_not() is not None, reason="native kernels do not run here")


@pytest.fixture(params=["AVX512", "AVX2"], scope="module")
def run(request, tmp_path_factory):
    """Calls a function of the source, compiled for one kind of CPU."""
    if request.param not in KINDS:
        pytest.skip(f"this CPU runs no {request.param}")
    path = tmp_path_factory.mktemp(request.param) / "vectors.cpp"
    path.write_text(f"// {request.param}\n{SOURCE}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "vector_instructions", lambda: request.param)
        native.library(path)

    def call(function, sizes, *tensors):
        if function == "product_bfloat16" and request.param == "AVX512" and not has_bfloat16_products():
            pytest.skip(native.NO_BFLOAT16)
        native.call(path, function, sizes, (), *tensors)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_a_vector(run, dtype):
    x, y = torch.randn(16).to(dtype), torch.full((17, 2, 16), 7.0, dtype=dtype)
    run(f"parts_{native.suffix(dtype)}", (), x, y)
    within = torch.arange(16) < torch.arange(17)[:, None]
    assert torch.equal(y[:, 0], torch.where(within, x, 7.0))
    assert torch.equal(y[:, 1], torch.where(within, x, 0.0))


def test_rounding_to_bfloat16(run):
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan])
    x = torch.cat(
        (
            ties,
            torch.tensor([0.0, -0.0, 1e-40, -1e-45, 2**-133]),
            torch.randn(1000) * 10.0 ** torch.randint(-38, 38, (1000,)),
        )
    )
    x = torch.nn.functional.pad(x, (0, -len(x) % 16))
    y = torch.empty(len(x), dtype=torch.bfloat16)
    run("rounded", (len(x),), x, y)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.nan_to_num(5.0).view(torch.int16), x.bfloat16().nan_to_num(5.0).view(torch.int16))


def test_exponentials(run):
    x = torch.cat(
        (
            torch.linspace(-104, 89, 4000),
            torch.tensor([0.0, -0.0, -torch.inf, torch.inf, torch.nan, -1e30, 1e30, -104.0]),
        )
    )
    x = torch.nn.functional.pad(x, (0, -len(x) % 16))
    y, precise = torch.empty_like(x), torch.empty_like(x)
    run("exponentials", (len(x),), x, y, precise)
    truth = x.double().exp()
    assert y[4000] == y[4001] == 1
    for found, units in ((y, 400), (precise, 2)):  # the argument times log2(e) is rounded: 88 · 2⁻²⁴ · 1.44 · ln 2
        assert torch.equal(found.isnan(), x.isnan())
        error = (found.double() - truth).abs() / truth.clamp(min=2.0**-126)
        fits = truth.isfinite() & (truth < 3.4e38)
        assert (error[fits] <= units * 2**-24).all()
        assert found[truth.isinf()].isinf().all()


def test_columns_and_sums(run):
    x, y = torch.randn(16, 16), torch.empty(16, 16)
    run("transposed", (), x, y)
    assert torch.equal(y, x.T)
    halved = x[0]
    while len(halved) > 1:  # 16 to 8, to 4, to 2, to 1
        half = len(halved) // 2
        halved = halved[:half] + halved[half:]
    found = torch.empty(2)
    run("reduced", (), x[0].contiguous(), found)
    assert found.tolist() == [halved.item(), x[0].max().item()]
    run("reduced", (), torch.where(torch.arange(16) == 9, torch.nan, x[0]), found)
    assert found.isnan().all()


@pytest.mark.parametrize("n", [-(2**31), -1, 0, 1, 5, 8, 15, 16, 17, 0xA5C3, 2**31 - 1])
def test_lanes(run, n):
    start, end = torch.randint(-3, 19, (2, 16), dtype=torch.int32)
    end[:2] = torch.tensor([-(2**31), 2**31 - 1])
    found = torch.empty(3, 16, dtype=torch.int32)
    run("chosen", (n,), start, end, found)
    lane = torch.arange(16)
    assert torch.equal(found[0], ((n < start) | (n >= end)).int())
    assert torch.equal(found[1], (lane >= n).int())
    assert torch.equal(found[2], (n >> lane & 1).int())


def test_the_larger_and_the_positive(run):
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 2.0])
    a, b = special.repeat(2), torch.randn(16)
    b[12:] = torch.nan
    found = torch.empty(2, 16)
    run("larger_and_positive", (), a, b, found)
    assert torch.equal(found[0].nan_to_num(9), torch.maximum(a, b).nan_to_num(9))
    assert torch.equal(found[1].nan_to_num(9), a.clamp(min=0).nan_to_num(9))


def packed(b):
    return b.contiguous() if b.dtype == torch.float32 else b.view(len(b) // 2, 2, -1).transpose(1, 2).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("M", "N", "R"), [(1, 16, 2), (5, 64, 64), (6, 16, 8), (13, 24, 10), (64, 8, 34), (7, 2, 128)])
def test_products(run, M, N, R, dtype):
    """Beside float64; with other rows around, and added to what is there.  What lies between rows stays."""
    wide, a = torch.randn(M, R + 6).to(dtype), torch.randn(R, N).to(dtype)
    exact = wide[:, :R].double() @ a.double()
    found = torch.full((M + 1, N + 3), 5.0)
    for add in (0, 1):
        run(f"product_{native.suffix(dtype)}", (M, N, R, add, R + 6, N + 3), wide, packed(a), found)
        bound = (1 + add) * R * 2**-24 * (wide[:, :R].double().abs() @ a.double().abs())
        assert ((found[:M, :N] - (1 + add) * exact).abs() <= bound + 2**-23 * exact.abs()).all()
        assert (found[:M, N:] == 5).all()
        assert (found[M] == 5).all()
    alone = torch.empty(1, N)
    run(f"product_{native.suffix(dtype)}", (1, N, R, 0, R, N), wide[M - 1, :R].contiguous(), packed(a), alone)
    again = torch.empty(M, N)
    run(f"product_{native.suffix(dtype)}", (M, N, R, 0, R + 6, N), wide, packed(a), again)
    assert torch.equal(again[M - 1 :], alone)
    assert math.isfinite(alone.sum())

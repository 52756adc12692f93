"""The headers that the native kernels share, compiled alone: top-k keys, and the states of an online softmax."""

import pytest
import torch

from kernel_index.core import native
from kernel_index.routing import topk_keys

SOURCE = """
extern "C" void keys_of(const int64_t* n, const float* scores, const int64_t* indices, int64_t* keys,
                        int64_t* unpacked_indices, float* unpacked_scores) {
  for (int64_t i = 0; i < n[0]; ++i) {
    keys[i] = key_of(scores[i], indices[i]);
    unpacked_indices[i] = index_of(keys[i]);
    unpacked_scores[i] = score_of(keys[i]);
  }
}

// Scores [keys] and values [keys, D] in splits of `n[2]` keys, the states of which are merged one after the other.
extern "C" void attend(const int64_t* n, const float* scores, const float* values, float* out, float* lse) {
  const int64_t keys = n[0], D = n[1], split = n[2];
  RowState<float> all;
  std::vector<float> acc(D, 0.f), z(round_up(split, LANES));
  for (int64_t first = 0; first < keys; first += split) {
    RowState<float> part;
    std::vector<float> part_acc(D, 0.f);
    std::fill(z.begin(), z.end(), -INF);
    std::copy(scores + first, scores + std::min(first + split, keys), z.begin());
    softmax_row<float>(part, z.data(), z.data(), z.size(), 1.f);
    for (int64_t x = first; x < std::min(first + split, keys); ++x)
      for (int64_t d = 0; d < D; ++d) part_acc[d] += z[x - first] * values[x * D + d];
    const auto [alpha, beta] = all.merge(part);
    rescale_add(acc.data(), alpha, part_acc.data(), beta, D);
  }
  for (int64_t d = 0; d < D; ++d) out[d] = acc[d] * all.inv_row_sum();
  *lse = all.lse();
}
"""

pytestmark = pytest.mark.skipif(native.why_not(torch.zeros(1)) is not None, reason="native kernels do not run here")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("native") / "headers.cpp"
    path.write_text(SOURCE)
    return path


def test_keys_are_those_of_topk_keys(source):
    """One packing in both languages, also of infinities, zeros and NaN of either sign."""
    special = torch.tensor([0.0, torch.inf, torch.nan, 1.0, 2**-140, 3e38])
    scores = torch.cat([special, -special, torch.randn(100, generator=torch.Generator().manual_seed(0))])
    assert torch.signbit(scores[8])
    assert scores[8].isnan()
    indices = torch.randint(0, 2**31, scores.shape, generator=torch.Generator().manual_seed(1))
    indices[:2] = torch.tensor([0, 2**31 - 1])
    keys, unpacked, back = torch.empty_like(indices), torch.empty_like(indices), torch.empty_like(scores)
    native.call(source, "keys_of", (len(scores),), (), scores, indices, keys, unpacked, back)
    assert torch.equal(keys, topk_keys.pack(topk_keys.rank_of(scores), indices))
    assert torch.equal(unpacked, indices)
    torch.testing.assert_close(back, scores, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("split", [1, 7, 64, 1000])
@pytest.mark.parametrize("order", ["rising", "falling", "random", "masked"])
def test_merged_splits_are_the_softmax_over_all_keys(source, order, split):
    """Rising scores change the row maximum in every split; a split of masked keys changes nothing."""
    g = torch.Generator().manual_seed(0)
    scores, values = 30 * torch.randn(200, generator=g), torch.randn(200, 5, generator=g)
    if order in ("rising", "falling"):
        scores = scores.sort(descending=order == "falling").values
    elif order == "masked":
        scores[:70] = scores[150:] = -torch.inf
    out, lse = torch.empty(5), torch.empty(1)
    native.call(source, "attend", (200, 5, split), (), scores, values, out, lse)
    torch.testing.assert_close(out, (scores.double().softmax(0) @ values.double()).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse[0], scores.double().logsumexp(0).float(), rtol=1e-6, atol=1e-5)

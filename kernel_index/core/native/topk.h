// Exact top-k: a score and its index as one integer, packed as in routing/topk_keys.py.
namespace {

// key = rank · 2³¹ + (2³¹ − 1 − index): a larger score has a larger key, among equal scores the smaller index has.
// `rank` is the order of float32 as a signed integer; NaN of either sign ranks above +∞, and −0 and 0 are a tie.
inline int64_t key_of(float score, int64_t index) {
  const float plus = score + 0.f;  // −0 becomes 0
  int32_t bits;
  std::memcpy(&bits, &plus, sizeof bits);
  const int64_t rank = std::isnan(score) ? 0x7FFFFFFF : bits ^ ((bits >> 31) & 0x7FFFFFFF);
  return rank * (int64_t(1) << 31) + (0x7FFFFFFF - index);
}

inline int64_t index_of(int64_t key) { return 0x7FFFFFFF - (key & 0x7FFFFFFF); }

inline float score_of(int64_t key) {
  int32_t bits = static_cast<int32_t>(key >> 31);
  bits ^= (bits >> 31) & 0x7FFFFFFF;
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

// The `kept` largest keys of a row whose scores arrive by ascending index.  A few are held in order.  Of many,
// candidates are collected and cut down to the best now and then: insertion would move up to `kept` keys for each one.
// Once there are enough, a score that is not above the least kept one is skipped: an equal one has the larger index and
// loses.
struct TopScores {
  static constexpr int64_t FEW = 8;

  std::vector<int64_t> keys;
  int64_t kept = 0;
  float least = -INF;  // the smallest score kept, once `full`
  bool full = false;

  void begin(int64_t count) {
    keys.clear();
    kept = count;
    least = -INF;
    full = false;
  }

  void offer(float score, int64_t index) {
    if (kept <= FEW) return insert(key_of(score, index));
    keys.push_back(key_of(score, index));
    if (int64_t(keys.size()) >= 2 * kept + 64) cut();
  }

  void insert(int64_t key) {
    if (full || kept == 0) {
      if (kept == 0 || key < keys.back()) return;
      keys.pop_back();
    }
    keys.insert(std::upper_bound(keys.begin(), keys.end(), key, std::greater<>()), key);
    if (int64_t(keys.size()) == kept) full = true, least = score_of(keys.back());
  }

  // Offers the scores z[low .. high), of the indices first + low …; z is readable in whole vectors.
  void scan(const float* z, int64_t low, int64_t high, int64_t first) {
    if (kept == 0) return;
    for (int64_t i = low / LANES * LANES; i < high; i += LANES) {
      if (full && every(Vec::loadu(z + i) <= Vec(least))) continue;  // a NaN is not ≤, so it is offered
      for (int64_t x = std::max(i, low); x < std::min(i + LANES, high); ++x)
        if (!full || !(z[x] <= least)) offer(z[x], first + x);
    }
  }

  // Afterwards `keys` holds the best, in any order.
  void cut() {
    if (int64_t(keys.size()) < std::max<int64_t>(kept, 1)) return;
    if (kept > 0) std::nth_element(keys.begin(), keys.begin() + kept - 1, keys.end(), std::greater<>());
    keys.resize(kept);
    full = true;
    if (kept > 0) least = score_of(keys[kept - 1]);
  }
};

}  // namespace

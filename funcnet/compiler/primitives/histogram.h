// How many numbers lie in each of some bins of equal width.

#pragma once

#include <algorithm>
#include <cstdint>

namespace funcnet {

// Counts from `low` to `high`, both included; if they are equal, from the least to the greatest
// number. NaN and what lies outside is not counted.
template <typename T, int64_t BINS, int64_t N>
__attribute__((noinline)) void histogram(const T* x, T* counts, double low, double high) {
  T first = static_cast<T>(low), last = static_cast<T>(high);
  if (first == last && N > 0) {
    first = *std::min_element(x, x + N);
    last = *std::max_element(x, x + N);
  }
  if (first == last) {
    first -= 1;
    last += 1;
  }
  std::fill_n(counts, BINS, T(0));
  for (int64_t i = 0; i < N; ++i) {
    if (x[i] >= first && x[i] <= last) {
      const auto bin = static_cast<int64_t>((x[i] - first) / (last - first) * BINS);
      counts[std::min(bin, BINS - 1)] += 1;
    }
  }
}

}  // namespace funcnet

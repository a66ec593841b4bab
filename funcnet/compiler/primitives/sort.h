// A stable sort: of long lines by radix.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace funcnet {

// A number's order as an unsigned one: NaN is the greatest, as torch sorts it.
template <typename T>
inline uint64_t rank(T value) {
  if constexpr (!std::is_integral_v<T>) {
    if (value != value) {
      return ~uint64_t(0);
    }
    double wide = value == 0 ? 0.0 : static_cast<double>(value);
    uint64_t bits;
    std::memcpy(&bits, &wide, sizeof(bits));
    return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
  } else {
    return static_cast<uint64_t>(static_cast<int64_t>(value)) ^ uint64_t(1) << 63;
  }
}

struct Ranked {
  uint64_t rank;
  int64_t index;
};

// Lines of so few numbers are sorted by comparisons, on the stack.
constexpr int64_t SHORT_LINE = 128;

template <typename T>
void sort_short(const T* x, T* values, int64_t* indices, int64_t n, int64_t step, bool descending) {
  std::array<Ranked, SHORT_LINE> entries;
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t found = rank(x[i * step]);
    entries[i] = {descending ? ~found : found, i};
  }
  std::sort(entries.begin(), entries.begin() + n, [](const Ranked& a, const Ranked& b) {
    return a.rank < b.rank || (a.rank == b.rank && a.index < b.index);
  });
  for (int64_t i = 0; i < n; ++i) {
    if (values != nullptr) {
      values[i * step] = x[entries[i].index * step];
    }
    if (indices != nullptr) {
      indices[i * step] = entries[i].index;
    }
  }
}

// A stable sort of `outer` times `inner` lines of N numbers that lie `inner` apart: by bytes of
// their rank from the last to the first, without those that are the same in all.
template <typename T>
void sort(const T* x, T* values, int64_t* indices, int64_t outer, int64_t n, int64_t inner,
          bool descending) {
  if (n <= SHORT_LINE) {
    for (int64_t line = 0; line < outer * inner; ++line) {
      const int64_t start = line / inner * n * inner + line % inner;
      sort_short(x + start, values == nullptr ? nullptr : values + start,
                 indices == nullptr ? nullptr : indices + start, n, inner, descending);
    }
    return;
  }
  std::vector<Ranked> entries(n), sorted(n);
  for (int64_t line = 0; line < outer * inner; ++line) {
    const int64_t start = line / inner * n * inner + line % inner;
    uint64_t any = 0, all = ~uint64_t(0);
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t found = rank(x[start + i * inner]);
      entries[i] = {descending ? ~found : found, i};
      any |= entries[i].rank;
      all &= entries[i].rank;
    }
    for (int shift = 0; shift < 64; shift += 8) {
      if (((any ^ all) >> shift & 255) == 0) {
        continue;
      }
      std::array<int64_t, 257> begin{};
      for (const Ranked& entry : entries) {
        ++begin[(entry.rank >> shift & 255) + 1];
      }
      for (int digit = 0; digit < 256; ++digit) {
        begin[digit + 1] += begin[digit];
      }
      for (const Ranked& entry : entries) {
        sorted[begin[entry.rank >> shift & 255]++] = entry;
      }
      entries.swap(sorted);
    }
    for (int64_t i = 0; i < n; ++i) {
      if (values != nullptr) {
        values[start + i * inner] = x[start + entries[i].index * inner];
      }
      if (indices != nullptr) {
        indices[start + i * inner] = entries[i].index;
      }
    }
  }
}

}  // namespace funcnet

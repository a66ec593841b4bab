// Distances between rows: (sum |a - b|^p)^(1/p).

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "headers/lines.h"

namespace funcnet {

enum class Norm { COUNT, SUM, EUCLIDEAN, MAXIMUM, OTHER };

// Of two rows of SIZE numbers. NaN wins a maximum.
template <typename T, Norm NORM, int64_t SIZE>
inline T distance(const T* a, const T* b, T p) {
  T total = 0;
  if constexpr (NORM == Norm::MAXIMUM) {
    for (int64_t i = 0; i < SIZE; ++i) {
      const T difference = std::abs(a[i] - b[i]);
      total = total < difference || difference != difference ? difference : total;
    }
  } else if constexpr (NORM == Norm::OTHER) {
    for (int64_t i = 0; i < SIZE; ++i) {
      total += std::pow(std::abs(a[i] - b[i]), p);
    }
    total = std::pow(total, 1 / p);
  } else {
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < SIZE; ++i) {
      const T difference = a[i] - b[i];
      if constexpr (NORM == Norm::COUNT) {
        total += difference != 0 ? T(1) : T(0);
      } else if constexpr (NORM == Norm::SUM) {
        total += std::abs(difference);
      } else {
        total += difference * difference;
      }
    }
    if constexpr (NORM == Norm::EUCLIDEAN) {
      total = std::sqrt(total);
    }
  }
  return total;
}

// y[s, i, j] is the distance of row i of a[s] and row j of b[s]. Stacks of one matrix serve all.
template <typename T, Norm NORM, int64_t A, int64_t B, int64_t SIZE, int THREADS>
__attribute__((noinline)) void distances(const T* a, const T* b, T* y, int64_t stack,
                                         bool a_is_stack, bool b_is_stack, double p) {
  share<THREADS>(stack * A, B * SIZE, [=](int64_t row) {
    const int64_t s = row / A;
    const T* const one = a + (a_is_stack ? row : row % A) * SIZE;
    const T* const others = b + (b_is_stack ? s * B : 0) * SIZE;
    for (int64_t j = 0; j < B; ++j) {
      y[row * B + j] = distance<T, NORM, SIZE>(one, others + j * SIZE, static_cast<T>(p));
    }
  });
}

// The distances of each row to those after it, one after another.
template <typename T, Norm NORM, int64_t A, int64_t SIZE>
__attribute__((noinline)) void distances_within(const T* a, T* y, double p) {
  for (int64_t i = 0; i < A; ++i) {
    for (int64_t j = i + 1; j < A; ++j) {
      *y++ = distance<T, NORM, SIZE>(a + i * SIZE, a + j * SIZE, static_cast<T>(p));
    }
  }
}

}  // namespace funcnet

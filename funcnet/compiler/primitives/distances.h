// Distances between rows: (sum |a - b|^p)^(1/p).

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "headers/lines.h"

namespace funcnet {

enum class Norm { COUNT, SUM, EUCLIDEAN, MAXIMUM, OTHER };

// What one difference adds to a sum of powers, or makes of a maximum so far. NaN stays NaN.
template <Norm NORM, typename T>
inline T with(T total, T difference, T p) {
  if constexpr (NORM == Norm::COUNT) {
    return total + (difference == 0 || difference != difference ? difference : T(1));
  } else if constexpr (NORM == Norm::SUM) {
    return total + std::abs(difference);
  } else if constexpr (NORM == Norm::EUCLIDEAN) {
    return total + difference * difference;
  } else if constexpr (NORM == Norm::MAXIMUM) {
    const T size = std::abs(difference);
    return total < size || size != size ? size : total;
  } else {
    return total + std::pow(std::abs(difference), p);
  }
}

template <Norm NORM, typename T>
inline T root(T total, T p) {
  if constexpr (NORM == Norm::EUCLIDEAN) {
    return std::sqrt(total);
  } else if constexpr (NORM == Norm::OTHER) {
    return std::pow(total, 1 / p);
  } else {
    return total;
  }
}

// The distances of A rows to COUNT others, whose numbers lie transposed in `columns`.
template <typename T, Norm NORM, int64_t A, int64_t COUNT, int64_t SIZE>
FUNCNET_VECTORS inline void distances_to(const T* a, const T* b, T* columns, T* y, int64_t step,
                                         T p) {
  for (int64_t j = 0; j < COUNT; ++j) {
    for (int64_t k = 0; k < SIZE; ++k) {
      columns[k * COUNT + j] = b[j * SIZE + k];
    }
  }
  for (int64_t i = 0; i < A; ++i, a += SIZE, y += step) {
    T total[COUNT] = {};
    for (int64_t k = 0; k < SIZE; ++k) {
#pragma omp simd
      for (int64_t j = 0; j < COUNT; ++j) {
        total[j] = with<NORM>(total[j], a[k] - columns[k * COUNT + j], p);
      }
    }
#pragma omp simd
    for (int64_t j = 0; j < COUNT; ++j) {
      y[j] = root<NORM>(total[j], p);
    }
  }
}

// y[s, i, j] is the distance of row i of a[s] and row j of b[s]. Stacks of one matrix serve all.
template <typename T, Norm NORM, int64_t A, int64_t B, int64_t SIZE, int THREADS>
__attribute__((noinline)) void distances(const T* a, const T* b, T* y, int64_t stack,
                                         bool a_is_stack, bool b_is_stack, double p) {
  constexpr int64_t WIDTH = B < 32 ? B : 32, ALL = B / WIDTH, REST = B % WIDTH;
  constexpr int64_t BLOCKS = ALL + (REST != 0);
  share<THREADS>(stack * BLOCKS, A * WIDTH * SIZE, [=](int64_t index) {
    const int64_t s = index / BLOCKS, block = index % BLOCKS, first = block * WIDTH;
    const T* const ones = a + (a_is_stack ? s * A * SIZE : 0);
    const T* const others = b + ((b_is_stack ? s * B : 0) + first) * SIZE;
    T* const found = y + s * A * B + first;
    Scratch<T, WIDTH * SIZE> columns;
    const T exponent = static_cast<T>(p);
    if (block < ALL) {
      distances_to<T, NORM, A, WIDTH, SIZE>(ones, others, columns.data(), found, B, exponent);
    } else if constexpr (REST != 0) {
      distances_to<T, NORM, A, REST, SIZE>(ones, others, columns.data(), found, B, exponent);
    }
  });
}

// The distances of each row to those after it, one after another.
template <typename T, Norm NORM, int64_t A, int64_t SIZE>
__attribute__((noinline)) void distances_within(const T* a, T* y, double p) {
  const T exponent = static_cast<T>(p);
  for (int64_t i = 0; i < A; ++i) {
    for (int64_t j = i + 1; j < A; ++j) {
      T total = 0;
      for (int64_t k = 0; k < SIZE; ++k) {
        total = with<NORM>(total, a[i * SIZE + k] - a[j * SIZE + k], exponent);
      }
      *y++ = root<NORM>(total, exponent);
    }
  }
}

}  // namespace funcnet

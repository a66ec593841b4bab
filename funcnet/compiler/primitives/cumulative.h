// Sums, products, maxima and minima of the elements so far, along the middle one of three axes.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "headers/lines.h"

namespace funcnet {

// What PyTorch accumulates numbers of a type in on the CPU.
template <typename T>
using Accumulator = std::conditional_t<
    std::is_integral_v<T>, int64_t,
    std::conditional_t<std::is_same_v<T, float> || std::is_same_v<T, double>, double, float>>;

// As PyTorch casts: a negative number to an unsigned one goes through int64.
template <typename To, typename From>
inline To cast(From value) {
  if constexpr (std::is_same_v<To, bool>) {
    return value != From(0);
  } else if constexpr (std::is_unsigned_v<To> && !std::is_integral_v<From>) {
    return static_cast<To>(static_cast<int64_t>(value));
  } else {
    return static_cast<To>(value);
  }
}

struct Sum {
  template <typename A>
  static constexpr A start = 0;
  template <typename A>
  static A next(A total, A value) {
    return total + value;
  }
};

struct Product {
  template <typename A>
  static constexpr A start = 1;
  template <typename A>
  static A next(A total, A value) {
    return total * value;
  }
};

// total = log(exp(total) + exp(value)); NaN stays, and two equal infinities are what they are.
struct LogSumExp {
  template <typename A>
  static constexpr A start = -std::numeric_limits<A>::infinity();
  template <typename A>
  static A next(A total, A value) {
    const A least = total != total || total < value ? total : value;
    const A greatest = total != total || total > value ? total : value;
    if (least == greatest && !std::isfinite(least)) {
      return value;
    }
    return std::log1p(std::exp(least - greatest)) + greatest;
  }
};

// Of WIDTH neighbours that begin STEP apart, along N that lie STRIDE apart.
template <typename Operation, typename From, typename To, int64_t WIDTH, int64_t STEP, int64_t N,
          int64_t STRIDE>
FUNCNET_VECTORS inline void accumulate(const From* x, To* y) {
  using A = Accumulator<To>;
  A total[WIDTH];
  for (int64_t j = 0; j < WIDTH; ++j) {
    total[j] = Operation::template start<A>;
  }
  for (int64_t i = 0; i < N; ++i, x += STRIDE, y += STRIDE) {
#pragma omp simd
    for (int64_t j = 0; j < WIDTH; ++j) {
      total[j] = Operation::next(total[j], static_cast<A>(cast<To>(x[j * STEP])));
      y[j * STEP] = static_cast<To>(total[j]);
    }
  }
}

// Lines that are contiguous go four at a time, as each sum waits for the one before it; where the
// axis is not the last one, neighbours go together.
template <typename Operation, typename From, typename To, int64_t OUTER, int64_t N, int64_t INNER,
          int THREADS>
__attribute__((noinline)) void cumulative(const From* x, To* y) {
  if constexpr (INNER == 1) {
    constexpr int64_t GROUP = 4, ALL = OUTER / GROUP, REST = OUTER % GROUP;
    share<THREADS>(ALL, GROUP * N, [=](int64_t index) {
      const int64_t start = index * GROUP * N;
      accumulate<Operation, From, To, GROUP, N, N, 1>(x + start, y + start);
    });
    if constexpr (REST != 0) {
      const int64_t start = ALL * GROUP * N;
      accumulate<Operation, From, To, REST, N, N, 1>(x + start, y + start);
    }
  } else {
    // So many fit into registers, or else into the nearest cache.
    constexpr int64_t WIDTH = INNER <= 32 ? INNER : INNER < 512 ? 32 : 512;
    constexpr int64_t ALL = INNER / WIDTH, REST = INNER % WIDTH;
    constexpr int64_t BLOCKS = ALL + (REST != 0);
    share<THREADS>(OUTER * BLOCKS, N * WIDTH, [=](int64_t index) {
      const int64_t block = index % BLOCKS, start = index / BLOCKS * N * INNER + block * WIDTH;
      if (block < ALL) {
        accumulate<Operation, From, To, WIDTH, 1, N, INNER>(x + start, y + start);
      } else if constexpr (REST != 0) {
        accumulate<Operation, From, To, REST, 1, N, INNER>(x + start, y + start);
      }
    });
  }
}

// Of WIDTH neighbours: the last of the greatest elements so far, or of NaN; or of the least ones.
template <typename T, bool GREATEST, int64_t WIDTH, int64_t N, int64_t STRIDE>
FUNCNET_VECTORS inline void find_extremes(const T* x, T* values, int64_t* indices) {
  T found[WIDTH];
  int64_t where[WIDTH];
  for (int64_t j = 0; j < WIDTH; ++j) {
    found[j] = x[j];
    where[j] = 0;
  }
  for (int64_t i = 0; i < N; ++i, x += STRIDE) {
#pragma omp simd
    for (int64_t j = 0; j < WIDTH; ++j) {
      const T value = x[j];
      const bool better = (GREATEST ? value >= found[j] : value <= found[j]) || value != value;
      found[j] = better ? value : found[j];
      where[j] = better ? i : where[j];
    }
    if (values != nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < WIDTH; ++j) {
        values[i * STRIDE + j] = found[j];
      }
    }
    if (indices != nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < WIDTH; ++j) {
        indices[i * STRIDE + j] = where[j];
      }
    }
  }
}

// Of a contiguous line. A new extreme is rare, so that a branch is faster than two choices.
template <typename T, bool GREATEST, int64_t N>
inline void find_extremes_of_line(const T* x, T* values, int64_t* indices) {
  T found = x[0];
  int64_t where = 0;
  for (int64_t i = 0; i < N; ++i) {
    if ((GREATEST ? x[i] >= found : x[i] <= found) || x[i] != x[i]) {
      found = x[i];
      where = i;
    }
    if (values != nullptr) {
      values[i] = found;
    }
    if (indices != nullptr) {
      indices[i] = where;
    }
  }
}

template <typename T, bool GREATEST, int64_t OUTER, int64_t N, int64_t INNER, int THREADS>
__attribute__((noinline)) void cumulative_extremes(const T* x, T* values, int64_t* indices) {
  constexpr int64_t WIDTH = INNER <= 32 ? INNER : INNER < 256 ? 32 : 256;
  constexpr int64_t ALL = INNER / WIDTH, REST = INNER % WIDTH;
  constexpr int64_t BLOCKS = ALL + (REST != 0);
  share<THREADS>(OUTER * BLOCKS, N * WIDTH, [=](int64_t index) {
    const int64_t block = index % BLOCKS, start = index / BLOCKS * N * INNER + block * WIDTH;
    T* const y = values == nullptr ? nullptr : values + start;
    int64_t* const where = indices == nullptr ? nullptr : indices + start;
    if constexpr (INNER == 1) {
      find_extremes_of_line<T, GREATEST, N>(x + start, y, where);
    } else if (block < ALL) {
      find_extremes<T, GREATEST, WIDTH, N, INNER>(x + start, y, where);
    } else if constexpr (REST != 0) {
      find_extremes<T, GREATEST, REST, N, INNER>(x + start, y, where);
    }
  });
}

}  // namespace funcnet

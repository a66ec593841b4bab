// Elements combined with others at indices: sums, products, means, maxima and minima.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "headers/lines.h"

namespace funcnet {

// What is scattered: sizes and strides along RANK axes, of which AXIS has indices. Along the last
// one, elements of the source and of the result are neighbours.
template <int RANK>
struct Scattered {
  int64_t size[RANK], of_index[RANK], of_source[RANK], of_result[RANK];
  int64_t places;  // along the axis of the result
  int64_t dim;     // that axis, as the user counts it
};

inline int64_t checked(int64_t index, int64_t places, int64_t dim) {
  if (index < 0 || index >= places) {
    throw std::runtime_error("index " + std::to_string(index) +
                             " is out of bounds for dimension " + std::to_string(dim) +
                             " with size " + std::to_string(places));
  }
  return index;
}

// Calls function(result, source) for the places of each index, in order.
template <int RANK, int AXIS, typename I, typename Function>
inline void each_scattered(const I* index, const Scattered<RANK>& s, Function function) {
  int64_t count = 1, position[RANK] = {};
  for (int axis = 0; axis < RANK - 1; ++axis) {
    count *= s.size[axis];
  }
  constexpr int LAST = RANK - 1;
  for (int64_t row = 0; row < count; ++row) {
    int64_t at = 0, source = 0, result = 0;
    for (int axis = 0; axis < LAST; ++axis) {
      at += position[axis] * s.of_index[axis];
      source += position[axis] * s.of_source[axis];
      result += axis == AXIS ? 0 : position[axis] * s.of_result[axis];
    }
    if (AXIS < LAST && s.of_index[LAST] == 0) {
      // One index for all of the row.
      const int64_t place = checked(index[at], s.places, s.dim);
      result += place * s.of_result[AXIS];
      for (int64_t j = 0; j < s.size[LAST]; ++j) {
        function(result + j, source + j);
      }
    } else {
      for (int64_t j = 0; j < s.size[LAST]; ++j) {
        const int64_t place = checked(index[at + j * s.of_index[LAST]], s.places, s.dim);
        function(result + (AXIS == LAST ? place : j + place * s.of_result[AXIS]), source + j);
      }
    }
    for (int axis = LAST - 1; axis >= 0 && ++position[axis] == s.size[axis]; --axis) {
      position[axis] = 0;
    }
  }
}

enum class Reduction { SUM, PRODUCT, MEAN, MAXIMUM, MINIMUM };

template <Reduction REDUCTION, typename A>
inline A neutral() {
  using Limits = std::numeric_limits<A>;
  if constexpr (REDUCTION == Reduction::PRODUCT) {
    return A(1);
  } else if constexpr (REDUCTION == Reduction::MAXIMUM) {
    return Limits::has_infinity ? -Limits::infinity() : Limits::lowest();
  } else if constexpr (REDUCTION == Reduction::MINIMUM) {
    return Limits::has_infinity ? Limits::infinity() : Limits::max();
  } else {
    return A(0);
  }
}

// NaN is greater and less than all.
template <Reduction REDUCTION, typename A>
inline A combined(A a, A b) {
  if constexpr (REDUCTION == Reduction::PRODUCT) {
    return a * b;
  } else if constexpr (REDUCTION == Reduction::MAXIMUM) {
    return b != b || a < b ? b : a;
  } else if constexpr (REDUCTION == Reduction::MINIMUM) {
    return b != b || b < a ? b : a;
  } else {
    return a + b;
  }
}

// As torch divides: integers towards minus infinity.
template <typename A>
inline A divided(A total, int64_t count) {
  if constexpr (std::is_integral_v<A>) {
    const A n = static_cast<A>(count), quotient = total / n;
    return total % n < 0 ? quotient - 1 : quotient;
  } else {
    return total / static_cast<A>(count);
  }
}

// result[index] = the reduction of x[index], if INCLUDES it, and of the source where index says so.
// Numbers of 16 bits are accumulated in float.
template <typename T, Reduction REDUCTION, bool INCLUDES, int64_t COUNT, int RANK, int AXIS,
          typename I>
__attribute__((noinline)) void scatter_reduce(const T* x, const I* index, const T* source, T* result,
                                              const Scattered<RANK>& s) {
  constexpr bool WIDER = !std::is_arithmetic_v<T>, MEAN = REDUCTION == Reduction::MEAN;
  using A = std::conditional_t<WIDER, float, T>;
  Scratch<A, WIDER ? COUNT : 1> wide;
  Scratch<int64_t, MEAN ? COUNT : 1> counts;
  A* totals;
  if constexpr (WIDER) {
    totals = wide.data();
  } else {
    totals = result;
  }
  if (static_cast<const void*>(totals) != static_cast<const void*>(x)) {
    for (int64_t i = 0; i < COUNT; ++i) {
      totals[i] = static_cast<A>(x[i]);
    }
  }
  if constexpr (MEAN) {
    std::fill_n(counts.data(), COUNT, INCLUDES ? 1 : 0);
  }
  if constexpr (!INCLUDES) {
    each_scattered<RANK, AXIS>(index, s, [=](int64_t to, int64_t) {
      totals[to] = neutral<REDUCTION, A>();
    });
  }
  each_scattered<RANK, AXIS>(index, s, [&](int64_t to, int64_t from) {
    totals[to] = combined<REDUCTION, A>(totals[to], static_cast<A>(source[from]));
    if constexpr (MEAN) {
      ++counts.data()[to];
    }
  });
  for (int64_t i = 0; (MEAN || WIDER) && i < COUNT; ++i) {
    A total = totals[i];
    if constexpr (MEAN) {
      // As PyTorch has it, the sum is rounded before it is divided.
      total = divided<A>(static_cast<T>(total), std::max<int64_t>(counts.data()[i], 1));
    }
    result[i] = static_cast<T>(total);
  }
}

// result[i] = the next element of the source where the mask says so, else x[i].
template <typename T>
inline void masked_scatter(const T* x, const bool* mask, const T* source, T* result, int64_t count,
                           int64_t given) {
  int64_t taken = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (mask[i] && taken == given) {
      throw std::runtime_error("masked_scatter: expects as many elements in source as the mask is "
                               "True, at least; got " + std::to_string(given));
    }
    result[i] = mask[i] ? source[taken++] : x[i];
  }
}

}  // namespace funcnet

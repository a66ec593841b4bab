// The lines of a tensor along an axis: threads share them, and each has memory of its own.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <memory>
#include <type_traits>

#include "headers/failure.h"

// Loops are vectorized by hand or by Inductor, but for those of functions with this.
#if defined(__GNUC__) && !defined(__clang__)
#define FUNCNET_VECTORS __attribute__((optimize("tree-loop-vectorize")))
#else
#define FUNCNET_VECTORS
#endif

namespace funcnet {

// To start threads for fewer numbers than this takes longer than the work.
constexpr int64_t ENOUGH_FOR_THREADS = 1 << 15;

// Calls function(0) ... function(count - 1), by THREADS if that is `size` numbers each.
template <int THREADS, typename Function>
inline void share(int64_t count, int64_t size, Function function) {
  if constexpr (THREADS > 1) {
    if (count > 1 && count * size >= ENOUGH_FOR_THREADS) {
      Failure failure;
#pragma omp parallel for num_threads(THREADS)
      for (int64_t index = 0; index < count; ++index) {
        try {
          function(index);
        } catch (const std::exception& error) {
          failure.keep(error);
        }
      }
      failure.rethrow();
      return;
    }
  }
  for (int64_t index = 0; index < count; ++index) {
    function(index);
  }
}

// Memory for N entries, without values: on the stack if they are few.
template <typename T, int64_t N>
class Scratch {
 public:
  T* data() {
    if constexpr (ON_STACK) {
      return entries.data();
    } else {
      return entries.get();
    }
  }

 private:
  static constexpr bool ON_STACK = N * sizeof(T) <= 1 << 13;
  using Entries = std::conditional_t<ON_STACK, std::array<T, ON_STACK ? N : 1>, std::unique_ptr<T[]>>;
  static Entries made() {
    if constexpr (!ON_STACK) {
      return Entries(new T[N]);
    } else {
      return {};
    }
  }
  Entries entries = made();
};

}  // namespace funcnet

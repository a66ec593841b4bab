// Where values belong in sorted sequences, by bisection.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "headers/lines.h"

namespace funcnet {

// The index of the first of N elements that is not less than the value, or, if RIGHT, greater;
// sorter[i] is the place of the i-th in order.
template <typename C, bool RIGHT, int64_t N, typename S, typename V>
inline int64_t place_of(const S* sequence, const int64_t* sorter, V given) {
  const C value = static_cast<C>(given);
  int64_t start = 0, end = N;
  while (start < end) {
    const int64_t middle = start + (end - start) / 2;
    int64_t place = middle;
    if (sorter != nullptr) {
      place = sorter[middle];
      if (place < 0 || place >= N) {
        throw std::runtime_error("index " + std::to_string(place) + " in sorter is out of bounds");
      }
    }
    const C found = static_cast<C>(sequence[place]);
    const bool after = RIGHT ? !(found > value) : !(found >= value);
    start = after ? middle + 1 : start;
    end = after ? end : middle;
  }
  return start;
}

// COUNT values for each of ROWS sequences of N elements, compared as numbers of type C.
template <typename C, bool RIGHT, int64_t ROWS, int64_t N, int64_t COUNT, int THREADS, typename S,
          typename V, typename I>
__attribute__((noinline)) void search(const S* sequences, const int64_t* sorter, const V* values,
                                      I* found) {
  share<THREADS>(ROWS * COUNT, 16, [=](int64_t index) {
    const int64_t row = ROWS == 1 ? 0 : index / COUNT;
    const int64_t* const order = sorter == nullptr ? nullptr : sorter + row * N;
    found[index] = place_of<C, RIGHT, N>(sequences + row * N, order, values[index]);
  });
}

}  // namespace funcnet

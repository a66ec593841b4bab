// Some elements in order: the greatest, the k-th, the median, the most frequent one. Of equal
// elements those are taken that PyTorch takes on the CPU, so the steps are the same.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "headers/lines.h"

namespace funcnet {

template <typename T>
struct Entry {
  T value;
  int64_t index;
};

// NaN counts as the greatest number.
template <bool LARGEST>
struct First {
  template <typename T>
  bool operator()(T a, T b) const {
    if constexpr (LARGEST) {
      return (a != a && b == b) || a > b;
    } else {
      return (a == a && b != b) || a < b;
    }
  }
  template <typename T>
  bool operator()(const Entry<T>& a, const Entry<T>& b) const {
    return (*this)(a.value, b.value);
  }
};

// The lines of x along the middle axis: function(numbers of a line, that lie INNER apart; where
// COUNT results of the line begin).
template <int64_t OUTER, int64_t N, int64_t INNER, int64_t COUNT, int THREADS, typename T,
          typename Function>
inline void select_lines(const T* x, Function function) {
  share<THREADS>(OUTER * INNER, N, [=](int64_t line) {
    const int64_t outer = line / INNER, inner = line % INNER;
    function(x + outer * N * INNER + inner, outer * COUNT * INNER + inner);
  });
}

template <int64_t N, int64_t INNER, typename T>
inline void fill(Entry<T>* entries, const T* line) {
  for (int64_t i = 0; i < N; ++i) {
    entries[i] = {line[i * INNER], i};
  }
}

template <typename T>
inline void put(const Entry<T>& found, T* values, int64_t* indices, int64_t place) {
  if (values != nullptr) {
    values[place] = found.value;
  }
  if (indices != nullptr) {
    indices[place] = found.index;
  }
}

// The algorithms are compiled once for each type of numbers, and not for each size.
template <bool LARGEST, bool SORTED, typename T>
__attribute__((noinline)) void bring_first(Entry<T>* entries, int64_t k, int64_t n) {
  const First<LARGEST> first;
  std::nth_element(entries, entries + k - 1, entries + n, first);
  if constexpr (SORTED) {
    std::sort(entries, entries + k - 1, first);
  }
}

template <bool LARGEST, typename T>
__attribute__((noinline)) void keep_first(Entry<T>* best, int64_t k, const T* line, int64_t n,
                                          int64_t step) {
  const First<LARGEST> first;
  std::make_heap(best, best + k, first);
  for (int64_t i = k; i < n; ++i) {
    const T value = line[i * step];
    if (first(value, best[0].value)) {
      best[k] = {value, i};
      std::pop_heap(best, best + k + 1, first);
    }
  }
  std::sort_heap(best, best + k, first);
}

template <typename T>
__attribute__((noinline)) void bring_middle(Entry<T>* entries, int64_t middle, int64_t n) {
  std::nth_element(entries, entries + middle, entries + n,
                   [](const Entry<T>& a, const Entry<T>& b) {
                     return a.value < b.value || (a.value == b.value && a.index < b.index) ||
                            (b.value != b.value && a.value == a.value);
                   });
}

template <typename T>
__attribute__((noinline)) void sort_entries(Entry<T>* entries, int64_t n) {
  std::sort(entries, entries + n,
            [](const Entry<T>& a, const Entry<T>& b) { return a.value < b.value; });
}

// The first K in order. Few of many are kept in a heap, the worst of them on top: most elements are
// compared with that one alone.
template <typename T, bool LARGEST, bool SORTED, int64_t K, int64_t N, int64_t INNER>
inline void topk_line(const T* line, T* values, int64_t* indices, int64_t start) {
  constexpr bool FEW = K * 64 <= N;
  constexpr int64_t KEPT = FEW ? K + 1 : N;
  Scratch<Entry<T>, KEPT> scratch;
  Entry<T>* const best = scratch.data();
  fill<FEW ? K : N, INNER>(best, line);
  if constexpr (FEW) {
    keep_first<LARGEST>(best, K, line, N, INNER);
  } else {
    bring_first<LARGEST, SORTED>(best, K, N);
  }
  for (int64_t i = 0; i < K; ++i) {
    put(best[i], values, indices, start + i * INNER);
  }
}

template <typename T, bool LARGEST, bool SORTED, int64_t K, int64_t OUTER, int64_t N, int64_t INNER,
          int THREADS>
__attribute__((noinline)) void topk(const T* x, T* values, int64_t* indices) {
  select_lines<OUTER, N, INNER, K, THREADS>(x, [=](const T* line, int64_t start) {
    topk_line<T, LARGEST, SORTED, K, N, INNER>(line, values, indices, start);
  });
}

// Hoare's quickselect with the median of three as pivot, as Sedgewick has it: brings to its place
// the entry that is the k-th in order. after(a, b) says whether a comes after b.
template <typename E, typename After>
__attribute__((noinline)) void quickselect(E* entries, int64_t n, int64_t k, After after) {
  const auto in_order = [=](int64_t a, int64_t b) {
    if (after(entries[a], entries[b])) {
      std::swap(entries[a], entries[b]);
    }
  };
  int64_t left = 0, right = n - 1;
  while (right > left + 1) {
    std::swap(entries[(left + right) / 2], entries[left + 1]);
    in_order(left + 1, right);
    in_order(left, right);
    in_order(left + 1, left);
    const E pivot = entries[left];
    int64_t low = left + 1, high = right;
    while (true) {
      while (after(pivot, entries[++low])) {
      }
      while (after(entries[--high], pivot)) {
      }
      if (high < low) {
        break;
      }
      std::swap(entries[low], entries[high]);
    }
    std::swap(entries[left], entries[high]);
    left = high <= k ? low : left;
    right = high >= k ? high - 1 : right;
  }
  if (right == left + 1) {
    in_order(left, right);
  }
}

// The K-th smallest, counted from 0.
template <typename T, int64_t K, int64_t OUTER, int64_t N, int64_t INNER, int THREADS>
__attribute__((noinline)) void kthvalue(const T* x, T* values, int64_t* indices) {
  select_lines<OUTER, N, INNER, 1, THREADS>(x, [=](const T* line, int64_t start) {
    Scratch<Entry<T>, N> scratch;
    fill<N, INNER>(scratch.data(), line);
    quickselect(scratch.data(), N, K, First<true>());
    put(scratch.data()[K], values, indices, start);
  });
}

// The lower median; NaN if there is one, or without the NaN.
template <typename T, bool IGNORES_NAN, int64_t OUTER, int64_t N, int64_t INNER, int THREADS>
__attribute__((noinline)) void median(const T* x, T* values, int64_t* indices) {
  select_lines<OUTER, N, INNER, 1, THREADS>(x, [=](const T* line, int64_t start) {
    int64_t missing = 0;
    for (int64_t i = 0; i < N; ++i) {
      const T value = line[i * INNER];
      if (value != value) {
        if constexpr (!IGNORES_NAN) {
          return put<T>({value, i}, values, indices, start);
        }
        ++missing;
      }
    }
    Scratch<Entry<T>, N> scratch;
    Entry<T>* const entries = scratch.data();
    fill<N, INNER>(entries, line);
    const int64_t middle = (N - missing - 1) / 2;
    bring_middle(entries, middle, N);
    put(entries[middle], values, indices, start);
  });
}

// The most frequent element; of several the smallest.
template <typename T, int64_t OUTER, int64_t N, int64_t INNER, int THREADS>
__attribute__((noinline)) void mode(const T* x, T* values, int64_t* indices) {
  select_lines<OUTER, N, INNER, 1, THREADS>(x, [=](const T* line, int64_t start) {
    Scratch<Entry<T>, N + 1> scratch;
    // Where NaN breaks the order, std::sort could leave the range: nothing is less than NaN.
    scratch.data()[0] = {std::numeric_limits<T>::quiet_NaN(), 0};
    Entry<T>* const entries = scratch.data() + 1;
    fill<N, INNER>(entries, line);
    sort_entries(entries, N);
    Entry<T> found{};
    int64_t most = 0, run = 0;
    for (int64_t i = 0; i < N; ++i) {
      ++run;
      if (i == N - 1 || entries[i].value != entries[i + 1].value) {
        if (run > most) {
          found = entries[i];
          most = run;
        }
        run = 0;
      }
    }
    put(found, values, indices, start);
  });
}

}  // namespace funcnet

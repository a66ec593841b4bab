// Small matrices in factors: P A = L U, A = L L^T, and substitution.
//
// A call of LAPACK costs more than the arithmetic of such a matrix. Its sizes are constants; its rows
// lie in memory of ours, padded to whole vectors. Pivots and what a failure leaves are LAPACK's.

#pragma once

#include <ATen/cpu/vec/vec.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace funcnet {

// A matrix in memory; T is const where it is read. None has no data.
template <typename T>
struct Strided {
  T* data;
  int64_t down, across;
};

template <typename T, int64_t M, int64_t N>
struct Rows {
  using Vec = at::vec::Vectorized<T>;
  static constexpr int64_t LANES = Vec::size();
  static constexpr int64_t STEP = (N + LANES - 1) / LANES * LANES;
  alignas(64) T numbers[M * STEP > 0 ? M * STEP : 1];

  T* operator[](int64_t row) { return numbers + row * STEP; }

  void read(const T* x, int64_t down, int64_t across) {
    for (int64_t i = 0; i < M; ++i) {
      for (int64_t j = 0; j < STEP; ++j) {
        numbers[i * STEP + j] = j < N ? x[i * down + j * across] : T(0);
      }
    }
  }
  void write(T* x, int64_t down, int64_t across) const {
    for (int64_t i = 0; i < M; ++i) {
      for (int64_t j = 0; j < N; ++j) {
        x[i * down + j * across] = numbers[i * STEP + j];
      }
    }
  }
  void read_identity() {
    std::fill(numbers, numbers + M * STEP, T(0));
    for (int64_t i = 0; i < M; ++i) {
      numbers[i * STEP + i] = T(1);
    }
  }
  void swap(int64_t i, int64_t j) {
    if (i != j) {
      std::swap_ranges((*this)[i], (*this)[i] + STEP, (*this)[j]);
    }
  }
  // Row i -= factor * row k, from column `first` on.
  void subtract(int64_t i, int64_t k, T factor, int64_t first) {
    T* const y = (*this)[i];
    const T* const x = (*this)[k];
    const Vec minus(-factor);
    int64_t j = first / LANES * LANES;
    if (j < first && j < STEP) {
      const Vec old = Vec::loadu(y + j);
      const Vec changed = at::vec::fmadd(minus, Vec::loadu(x + j), old);
      const Vec mask = Vec::arange(T(j), T(1)) >= Vec(T(first));
      Vec::blendv(old, changed, mask).store(y + j);
      j += LANES;
    }
    for (; j < STEP; j += LANES) {
      at::vec::fmadd(minus, Vec::loadu(x + j), Vec::loadu(y + j)).store(y + j);
    }
  }
  void divide(int64_t i, T by) {
    T* const y = (*this)[i];
    for (int64_t j = 0; j < STEP; j += LANES) {
      (Vec::loadu(y + j) / Vec(by)).store(y + j);
    }
  }
};

// L below the diagonal, which is 1 there, and U; the index, from 1 on, of the first zero of U's
// diagonal, or 0.
template <typename T, int64_t M, int64_t N>
inline int32_t lu_factors(Rows<T, M, N>& a, int32_t* pivots) {
  int32_t info = 0;
  for (int64_t k = 0; k < std::min(M, N); ++k) {
    int64_t best = k;
    for (int64_t i = k + 1; i < M; ++i) {
      best = std::abs(a[i][k]) > std::abs(a[best][k]) ? i : best;
    }
    pivots[k] = static_cast<int32_t>(best + 1);
    const T pivot = a[best][k];
    if (pivot == T(0)) {
      info = info == 0 ? static_cast<int32_t>(k + 1) : info;
      continue;
    }
    a.swap(k, best);
    const bool is_normal = std::abs(pivot) >= std::numeric_limits<T>::min();
    const T inverse = T(1) / pivot;
    for (int64_t i = k + 1; i < M; ++i) {
      const T factor = is_normal ? a[i][k] * inverse : a[i][k] / pivot;
      a[i][k] = factor;
      a.subtract(i, k, factor, k + 1);
    }
  }
  return info;
}

// U of A = U^T U, of the upper triangle of A, and 0 below it; the order of the first leading minor
// that is not positive, or 0.
template <typename T, int64_t N>
inline int32_t cholesky_factor(Rows<T, N, N>& a) {
  constexpr int64_t STEP = Rows<T, N, N>::STEP, LANES = Rows<T, N, N>::LANES;
  int32_t info = 0;
  for (int64_t j = 0; j < N && info == 0; ++j) {
    T given[STEP];
    std::copy(a[j], a[j] + STEP, given);
    for (int64_t k = 0; k < j; ++k) {
      // From the start of a vector on: what is below the diagonal does not matter yet.
      a.subtract(j, k, a[k][j], j / LANES * LANES);
    }
    const T pivot = a[j][j];
    if (!(pivot > T(0))) {
      std::copy(given, given + STEP, a[j]);
      info = static_cast<int32_t>(j + 1);
    } else {
      a.divide(j, std::sqrt(pivot));
    }
    a[j][j] = info == 0 ? std::sqrt(pivot) : pivot;
  }
  for (int64_t i = 0; i < N; ++i) {
    std::fill(a[i], a[i] + i, T(0));
  }
  return info;
}

// x = t^-1 x, where t is triangular: its other half is not read, nor its diagonal if that is 1.
template <bool UPPER, bool UNIT, typename T, int64_t N, int64_t R>
inline void substitute(const T* t, int64_t down, int64_t across, Rows<T, N, R>& x) {
  for (int64_t step = 0; step < N; ++step) {
    const int64_t k = UPPER ? N - 1 - step : step;
    if constexpr (!UNIT) {
      x.divide(k, t[k * down + k * across]);
    }
    for (int64_t i = UPPER ? 0 : k + 1; i < (UPPER ? k : N); ++i) {
      x.subtract(i, k, t[i * down + k * across], 0);
    }
  }
}

}  // namespace funcnet

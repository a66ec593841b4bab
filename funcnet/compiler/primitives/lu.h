// Small matrices by LU factors: solve, inverse, determinant.

#pragma once

#include "headers/factors.h"

namespace funcnet {

// x = a^-1 x by the factors of a; of its transpose, if TURNED.
template <bool TURNED, typename T, int64_t N, int64_t R>
inline void substitute_lu(const T* lu, int64_t down, int64_t across, const int32_t* pivots,
                          Rows<T, N, R>& x) {
  if constexpr (TURNED) {
    substitute<false, false>(lu, across, down, x);
    substitute<true, true>(lu, across, down, x);
    for (int64_t k = N - 1; k >= 0; --k) {
      x.swap(k, pivots[k] - 1);
    }
  } else {
    for (int64_t k = 0; k < N; ++k) {
      x.swap(k, pivots[k] - 1);
    }
    substitute<false, true>(lu, down, across, x);
    substitute<true, false>(lu, down, across, x);
  }
}

template <typename T, int64_t M, int64_t N>
__attribute__((noinline)) void lu_factor(Strided<const T> a, Strided<T> lu, int32_t* pivots,
                                         int32_t* info) {
  Rows<T, M, N> factors;
  int32_t order[M + N + 1];
  factors.read(a.data, a.down, a.across);
  const int32_t failed = lu_factors(factors, order);
  if (lu.data != nullptr) {
    factors.write(lu.data, lu.down, lu.across);
  }
  if (pivots != nullptr) {
    std::copy(order, order + std::min(M, N), pivots);
  }
  if (info != nullptr) {
    *info = failed;
  }
}

// x = a^-1 b, or by the transpose of a if TURNED; b is the identity if it has no data.
template <typename T, int64_t N, int64_t R, bool TURNED>
__attribute__((noinline)) void solve(Strided<const T> a, Strided<const T> b, Strided<T> x,
                                     Strided<T> lu, int32_t* pivots, int32_t* info) {
  Rows<T, N, N> factors;
  Rows<T, N, R> found;
  int32_t order[N + 1];
  factors.read(a.data, a.down, a.across);
  const int32_t failed = lu_factors(factors, order);
  if (lu.data != nullptr) {
    factors.write(lu.data, lu.down, lu.across);
  }
  if (pivots != nullptr) {
    std::copy(order, order + N, pivots);
  }
  if (info != nullptr) {
    *info = failed;
  }
  if (x.data != nullptr) {
    if (b.data == nullptr) {
      found.read_identity();
    } else {
      found.read(b.data, b.down, b.across);
    }
    substitute_lu<TURNED>(factors.numbers, factors.STEP, 1, order, found);
    found.write(x.data, x.down, x.across);
  }
}

template <typename T, int64_t N, int64_t R, bool TURNED>
__attribute__((noinline)) void lu_solve(Strided<const T> lu, const int32_t* pivots,
                                        Strided<const T> b, Strided<T> x) {
  Rows<T, N, R> found;
  found.read(b.data, b.down, b.across);
  substitute_lu<TURNED>(lu.data, lu.down, lu.across, pivots, found);
  found.write(x.data, x.down, x.across);
}

// The determinant, or its sign and the logarithm of its absolute value.
template <typename T, int64_t N>
__attribute__((noinline)) void determinant(Strided<const T> a, T* value, T* sign, T* logarithm,
                                           Strided<T> lu, int32_t* pivots) {
  Rows<T, N, N> factors;
  int32_t order[N + 1];
  factors.read(a.data, a.down, a.across);
  lu_factors(factors, order);
  T product = 1, parity = 1, sum = 0;
  for (int64_t k = 0; k < N; ++k) {
    const T u = factors[k][k];
    product *= u;
    parity = order[k] == k + 1 ? parity : -parity;
    parity = u != u ? u : parity * T((u > 0) - (u < 0));
    sum += std::log(std::abs(u));
  }
  if (value != nullptr) {
    T swaps = 1;
    for (int64_t k = 0; k < N; ++k) {
      swaps = order[k] == k + 1 ? swaps : -swaps;
    }
    *value = swaps * product;
  }
  if (sign != nullptr) {
    *sign = parity;
  }
  if (logarithm != nullptr) {
    *logarithm = sum;
  }
  if (lu.data != nullptr) {
    factors.write(lu.data, lu.down, lu.across);
  }
  if (pivots != nullptr) {
    std::copy(order, order + N, pivots);
  }
}

// A = P L U, each apart.
template <typename T, int64_t M, int64_t N>
__attribute__((noinline)) void lu(Strided<const T> a, Strided<T> p, Strided<T> l, Strided<T> u) {
  constexpr int64_t K = std::min(M, N);
  Rows<T, M, N> factors;
  int32_t order[M + N + 1];
  int64_t rows[M + 1];
  factors.read(a.data, a.down, a.across);
  lu_factors(factors, order);
  for (int64_t i = 0; i < M; ++i) {
    rows[i] = i;
  }
  for (int64_t k = 0; k < K; ++k) {
    std::swap(rows[k], rows[order[k] - 1]);
  }
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t j = 0; j < M && p.data != nullptr; ++j) {
      p.data[j * p.down + i * p.across] = rows[i] == j;
    }
    for (int64_t j = 0; j < K && l.data != nullptr; ++j) {
      l.data[i * l.down + j * l.across] = i > j ? factors[i][j] : T(i == j);
    }
    for (int64_t j = 0; j < N && i < K && u.data != nullptr; ++j) {
      u.data[i * u.down + j * u.across] = i <= j ? factors[i][j] : T(0);
    }
  }
}

}  // namespace funcnet

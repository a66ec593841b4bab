// Small matrices by Cholesky factors.

#pragma once

#include "headers/factors.h"

namespace funcnet {

// The factor of a, of which the upper triangle is read; the other half of it is 0.
template <typename T, int64_t N>
__attribute__((noinline)) void cholesky(Strided<const T> a, Strided<T> factor, int32_t* info) {
  Rows<T, N, N> rows;
  rows.read(a.data, a.down, a.across);
  const int32_t failed = cholesky_factor(rows);
  if (factor.data != nullptr) {
    rows.write(factor.data, factor.down, factor.across);
  }
  if (info != nullptr) {
    *info = failed;
  }
}

// x = (u^T u)^-1 b.
template <typename T, int64_t N, int64_t R>
__attribute__((noinline)) void cholesky_solve(Strided<const T> u, Strided<const T> b,
                                              Strided<T> x) {
  Rows<T, N, R> found;
  found.read(b.data, b.down, b.across);
  substitute<false, false>(u.data, u.across, u.down, found);
  substitute<true, false>(u.data, u.down, u.across, found);
  found.write(x.data, x.down, x.across);
}

}  // namespace funcnet

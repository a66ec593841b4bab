// Small triangular matrices.

#pragma once

#include "headers/factors.h"

namespace funcnet {

// x = t^-1 b.
template <bool UPPER, bool UNIT, typename T, int64_t N, int64_t R>
__attribute__((noinline)) void solve_triangular(Strided<const T> t, Strided<const T> b,
                                                Strided<T> x) {
  Rows<T, N, R> found;
  found.read(b.data, b.down, b.across);
  substitute<UPPER, UNIT>(t.data, t.down, t.across, found);
  found.write(x.data, x.down, x.across);
}

template <typename T, int64_t N>
__attribute__((noinline)) void copy_matrix(Strided<const T> a, Strided<T> copy) {
  Rows<T, N, N> rows;
  rows.read(a.data, a.down, a.across);
  rows.write(copy.data, copy.down, copy.across);
}

}  // namespace funcnet

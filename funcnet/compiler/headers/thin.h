// Products of a few rows, which read each number of B once: the memory's speed is the limit.

#pragma once

#include <ATen/cpu/vec/functional_bfloat16.h>
#include <ATen/cpu/vec/vec.h>
#include <algorithm>
#include <cstdint>
#include <omp.h>
#include <type_traits>
#include <vector>

namespace funcnet {

// Of numbers From, which are summed as T: another type than From for bfloat16 and half.
template <typename T, int ROWS, typename From = T>
struct Thin {
  using Vec = at::vec::Vectorized<T>;
  static constexpr int64_t LANES = Vec::size();
  static constexpr int64_t COLUMNS = 4;

  static Vec read(const From* from) {
    if constexpr (std::is_same_v<T, From>) {
      return Vec::loadu(from);
    } else {
      Vec found;
      at::vec::load_to_float<From>(from, found);
      return found;
    }
  }

  static T total(const Vec& sums) {
    T each[LANES], sum = 0;
    sums.store(each);
    for (int64_t i = 0; i < LANES; ++i) {
      sum += each[i];
    }
    return sum;
  }

  // WIDTH columns of B, each contiguous: inner products with the rows of A, `step` apart.
  template <int64_t WIDTH>
  static void inner(const T* a, int64_t step, const From* b, int64_t bn, int64_t k, T* found) {
    Vec sums[ROWS][WIDTH][2];
    for (auto& row : sums) {
      for (auto& column : row) {
        column[0] = column[1] = Vec(T(0));
      }
    }
    int64_t i = 0;
    for (; i + 2 * LANES <= k; i += 2 * LANES) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < WIDTH; ++j) {
        const Vec left = read(b + j * bn + i), right = read(b + j * bn + i + LANES);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          sums[r][j][0] = at::vec::fmadd(Vec::loadu(a + r * step + i), left, sums[r][j][0]);
          sums[r][j][1] =
              at::vec::fmadd(Vec::loadu(a + r * step + i + LANES), right, sums[r][j][1]);
        }
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      for (int64_t j = 0; j < WIDTH; ++j) {
        T sum = total(sums[r][j][0] + sums[r][j][1]);
        for (int64_t rest = i; rest < k; ++rest) {
          sum += a[r * step + rest] * static_cast<T>(b[j * bn + rest]);
        }
        found[r * WIDTH + j] = sum;
      }
    }
  }

  // WIDTH vectors of columns of B, whose rows are contiguous, `bk` apart.
  template <int64_t WIDTH>
  static void outer(const T* a, int64_t step, const From* b, int64_t bk, int64_t k, T* found) {
    Vec sums[ROWS][WIDTH];
    for (auto& row : sums) {
      for (auto& column : row) {
        column = Vec(T(0));
      }
    }
    for (int64_t i = 0; i < k; ++i) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < WIDTH; ++j) {
        const Vec right = read(b + i * bk + j * LANES);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          sums[r][j] = at::vec::fmadd(Vec(a[r * step + i]), right, sums[r][j]);
        }
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      for (int64_t j = 0; j < WIDTH; ++j) {
        sums[r][j].store(found + (r * WIDTH + j) * LANES);
      }
    }
  }

  static void product(int64_t n, int64_t k, const From* given, int64_t am, int64_t ak,
                      const From* b, int64_t bk, int64_t bn, const From* bias, int64_t dm,
                      int64_t dn, From* c, int64_t cm, T alpha, T beta, int threads) {
    std::vector<T> rows;
    const T* a = nullptr;
    if constexpr (std::is_same_v<T, From>) {
      a = ak == 1 ? given : nullptr;
    }
    if (a == nullptr) {
      rows.resize(ROWS * k);
      for (int64_t r = 0; r < ROWS; ++r) {
        for (int64_t i = 0; i < k; ++i) {
          rows[r * k + i] = static_cast<T>(given[r * am + i * ak]);
        }
      }
      a = rows.data();
      am = k;
    }
    // As many columns at a time as stay in registers.
    const int64_t wide = bk == 1 ? COLUMNS : COLUMNS * LANES;
    const int64_t blocks = (n + wide - 1) / wide;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < blocks; ++block) {
      T found[ROWS * COLUMNS * LANES];
      const int64_t start = block * wide, stop = std::min(n, start + wide);
      const auto keep = [&](int64_t from, int64_t count) {
        for (int r = 0; r < ROWS; ++r) {
          for (int64_t j = 0; j < count; ++j) {
            const int64_t column = from + j;
            const T base =
                bias == nullptr ? T(0) : T(beta * static_cast<T>(bias[r * dm + column * dn]));
            c[r * cm + column] = static_cast<From>(base + alpha * found[r * count + j]);
          }
        }
      };
      if (bk == 1 && stop - start == wide) {
        inner<COLUMNS>(a, am, b + start * bn, bn, k, found);
        keep(start, COLUMNS);
      } else if (bk == 1) {
        for (int64_t column = start; column < stop; ++column) {
          inner<1>(a, am, b + column * bn, bn, k, found);
          keep(column, 1);
        }
      } else if (stop - start == wide) {
        outer<COLUMNS>(a, am, b + start, bk, k, found);
        keep(start, wide);
      } else {
        for (int64_t column = start; column < stop; ++column) {
          for (int r = 0; r < ROWS; ++r) {
            found[r] = T(0);
            for (int64_t i = 0; i < k; ++i) {
              found[r] += a[r * am + i] * static_cast<T>(b[i * bk + column]);
            }
          }
          keep(column, 1);
        }
      }
    }
  }
};

}  // namespace funcnet

// c[s] = bias[s] + a[s] @ b[s], for each s in a stack, where sizes and strides are constants.

#pragma once

#include "headers/failure.h"
#include "headers/gemm.h"
#include "headers/large.h"
#include "headers/thin.h"

namespace funcnet {

// From this many multiplications on, blocks for the caches pay; to start threads pays earlier.
constexpr int64_t LARGE = 1 << 22;
constexpr int64_t LARGE_FOR_THREADS = 1 << 20;
// Products of at most so many rows are bound by the memory of B, if that is large.
constexpr int64_t THIN = 4;
constexpr int64_t LARGE_FOR_THIN = 1 << 14;
constexpr int64_t LARGE_FOR_THIN_THREADS = 1 << 17;
// A panel of more rows than this would be too large for a thread's stack.
constexpr int64_t LONG = 2048;

template <typename T, bool HAS_BIAS, int64_t M, int64_t N, int64_t K, int64_t AM, int64_t AK,
          int64_t BK, int64_t BN, int64_t DM, int64_t DN, int64_t CM, int THREADS>
inline void one_product(const T* a, const T* b, const T* bias, T* c) {
  if constexpr (M <= THIN && N * K >= LARGE_FOR_THIN && N > 1 && (BK == 1 || BN == 1)) {
    constexpr int threads = N * K >= LARGE_FOR_THIN_THREADS ? THREADS : 1;
    Thin<T, M>::product(N, K, a, AM, AK, b, BK, BN, bias, DM, DN, c, CM, threads);
  } else if constexpr (M * N * K >= (THREADS == 1 ? LARGE : LARGE_FOR_THREADS) || K > LONG) {
    Large<T>::product(M, N, K, a, AM, AK, b, BK, BN, bias, DM, DN, c, CM, THREADS);
  } else {
    gemm<T, M, N, K, AM, AK, BK, BN, CM, HAS_BIAS, DM, DN>(a, b, bias, c);
  }
}

// S products of M x K by K x N matrices. AS, AM and AK are the strides of a along the stack, its
// rows and its columns, and so on; D are those of the bias.
template <typename T, bool HAS_BIAS, int64_t S, int64_t M, int64_t N, int64_t K, int64_t AS,
          int64_t AM, int64_t AK, int64_t BS, int64_t BK, int64_t BN, int64_t DS, int64_t DM,
          int64_t DN, int64_t CS, int64_t CM, int THREADS>
__attribute__((noinline)) void product(const T* a, const T* b, const T* bias, T* c) {
  if constexpr (THREADS > 1 && S >= THREADS && S * M * N * K >= LARGE_FOR_THREADS) {
    Failure failure;
#pragma omp parallel for num_threads(THREADS)
    for (int64_t s = 0; s < S; ++s) {
      try {
        one_product<T, HAS_BIAS, M, N, K, AM, AK, BK, BN, DM, DN, CM, 1>(
            a + s * AS, b + s * BS, bias + s * DS, c + s * CS);
      } catch (const std::exception& error) {
        failure.keep(error);
      }
    }
    failure.rethrow();
  } else {
    for (int64_t s = 0; s < S; ++s) {
      one_product<T, HAS_BIAS, M, N, K, AM, AK, BK, BN, DM, DN, CM, THREADS>(
          a + s * AS, b + s * BS, bias + s * DS, c + s * CS);
    }
  }
}

}  // namespace funcnet

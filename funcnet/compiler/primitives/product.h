// c[s] = beta * bias[s] + alpha * a[s] @ b[s], for each s in a stack, where sizes and strides are
// constants.

#pragma once

#include "headers/failure.h"
#include "headers/gemm.h"
#include "headers/large.h"
#include "headers/rounded.h"
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
// Of 16-bit numbers, so many values are made float32 at once; more go through blocks.
constexpr int64_t LARGE_FOR_ROUNDED = 1 << 13;

// What numbers are summed and scaled as.
template <typename T>
using Accumulated =
    std::conditional_t<std::is_same_v<T, c10::BFloat16> || std::is_same_v<T, c10::Half>, float, T>;

// beta * bias + alpha * a @ b; both factors are 1 unless SCALED.
template <typename T, bool HAS_BIAS, bool SCALED, int64_t M, int64_t N, int64_t K, int64_t AM,
          int64_t AK, int64_t BK, int64_t BN, int64_t DM, int64_t DN, int64_t CM, int THREADS>
inline void one_product(const T* a, const T* b, const T* bias, T* c, Accumulated<T> alpha,
                        Accumulated<T> beta) {
  constexpr bool ROUNDED = !std::is_same_v<T, Accumulated<T>>;
  constexpr int threads = M * N * K >= LARGE_FOR_THREADS ? THREADS : 1;
  if constexpr (M <= THIN && N * K >= LARGE_FOR_THIN && N > 1 && (BK == 1 || BN == 1)) {
    constexpr int threads = N * K >= LARGE_FOR_THIN_THREADS ? THREADS : 1;
    Thin<Accumulated<T>, M, T>::product(N, K, a, AM, AK, b, BK, BN, bias, DM, DN, c, CM, alpha,
                                        beta, threads);
  } else if constexpr (ROUNDED && M * K + K * N + M * N < LARGE_FOR_ROUNDED) {
    small_rounded<T, M, N, K, AM, AK, BK, BN, DM, DN, CM>(a, b, bias, c, alpha, beta);
  } else if constexpr (ROUNDED) {
    Rounded<T>::product(M, N, K, a, AM, AK, b, BK, BN, bias, DM, DN, c, CM, alpha, beta, threads);
  } else if constexpr (SCALED) {
    one_product<T, false, false, M, N, K, AM, AK, BK, BN, 0, 0, CM, THREADS>(a, b, nullptr, c, 1,
                                                                             1);
    for (int64_t i = 0; i < M; ++i) {
      for (int64_t j = 0; j < N; ++j) {
        const T term = HAS_BIAS ? beta * bias[i * DM + j * DN] : T(0);
        c[i * CM + j] = alpha * c[i * CM + j] + term;
      }
    }
  } else if constexpr (M * N * K >= (THREADS == 1 ? LARGE : LARGE_FOR_THREADS) || K > LONG) {
    Large<T>::product(M, N, K, a, AM, AK, b, BK, BN, bias, DM, DN, c, CM, THREADS);
  } else {
    gemm<T, M, N, K, AM, AK, BK, BN, CM, HAS_BIAS, DM, DN>(a, b, bias, c);
  }
}

// S products of M x K by K x N matrices. AS, AM and AK are the strides of a along the stack, its
// rows and its columns, and so on; D are those of the bias. `factors` are alpha and beta, if they
// are not 1.
template <typename T, bool HAS_BIAS, int64_t S, int64_t M, int64_t N, int64_t K, int64_t AS,
          int64_t AM, int64_t AK, int64_t BS, int64_t BK, int64_t BN, int64_t DS, int64_t DM,
          int64_t DN, int64_t CS, int64_t CM, int THREADS, typename... Factors>
__attribute__((noinline)) void product(const T* a, const T* b, const T* bias, T* c,
                                       Factors... factors) {
  constexpr bool SCALED = sizeof...(Factors) > 0;
  const Accumulated<T> given[] = {static_cast<Accumulated<T>>(factors)..., 1, 1};
  const Accumulated<T> alpha = given[0], beta = given[1];
  if constexpr (THREADS > 1 && S >= THREADS && S * M * N * K >= LARGE_FOR_THREADS) {
    Failure failure;
#pragma omp parallel for num_threads(THREADS)
    for (int64_t s = 0; s < S; ++s) {
      try {
        one_product<T, HAS_BIAS, SCALED, M, N, K, AM, AK, BK, BN, DM, DN, CM, 1>(
            a + s * AS, b + s * BS, HAS_BIAS ? bias + s * DS : nullptr, c + s * CS, alpha, beta);
      } catch (const std::exception& error) {
        failure.keep(error);
      }
    }
    failure.rethrow();
  } else {
    for (int64_t s = 0; s < S; ++s) {
      one_product<T, HAS_BIAS, SCALED, M, N, K, AM, AK, BK, BN, DM, DN, CM, THREADS>(
          a + s * AS, b + s * BS, HAS_BIAS ? bias + s * DS : nullptr, c + s * CS, alpha, beta);
    }
  }
}

// c = beta * bias + alpha * the sum of a[s] @ b[s], as torch has it: one after the other.
template <typename T, bool HAS_BIAS, int64_t S, int64_t M, int64_t N, int64_t K, int64_t AS,
          int64_t AM, int64_t AK, int64_t BS, int64_t BK, int64_t BN, int64_t DS, int64_t DM,
          int64_t DN, int64_t CS, int64_t CM, int THREADS>
__attribute__((noinline)) void summed_products(const T* a, const T* b, const T* bias, T* c,
                                               Accumulated<T> alpha, Accumulated<T> beta) {
  one_product<T, HAS_BIAS, true, M, N, K, AM, AK, BK, BN, DM, DN, CM, THREADS>(a, b, bias, c,
                                                                               alpha, beta);
  if constexpr (!std::is_same_v<T, Accumulated<T>>) {
    // Each sum is rounded: c is read where it is written.
    for (int64_t s = 1; s < S; ++s) {
      one_product<T, true, true, M, N, K, AM, AK, BK, BN, CM, 1, CM, THREADS>(
          a + s * AS, b + s * BS, c, c, alpha, 1);
    }
  } else if constexpr (S > 1) {
    T* const next = Large<T>::buffer(M * N);
    for (int64_t s = 1; s < S; ++s) {
      one_product<T, false, true, M, N, K, AM, AK, BK, BN, 0, 0, N, THREADS>(
          a + s * AS, b + s * BS, nullptr, next, alpha, 1);
      for (int64_t i = 0; i < M; ++i) {
        for (int64_t j = 0; j < N; ++j) {
          c[i * CM + j] += next[i * N + j];
        }
      }
    }
    std::free(next);
  }
}

}  // namespace funcnet

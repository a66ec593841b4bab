// Products of small matrices whose shapes and strides are known when they are compiled.
//
// C[m, n] = bias[m, n] + sum_k A[m, k] B[k, n], with any strides of A, B and bias; the rows of C are
// contiguous. A call of a BLAS library costs more than such a product takes; here all loops have
// constant bounds and the sums stay in registers. Columns are cut into panels of V vectors; a panel
// of B is copied first where its rows are not contiguous.

#pragma once

#include <ATen/cpu/vec/vec.h>
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

namespace funcnet {

template <typename T, int64_t N>
inline at::vec::Vectorized<T> load(const T* from) {
  using Vec = at::vec::Vectorized<T>;
  if constexpr (N >= Vec::size()) {
    return Vec::loadu(from);
  } else {
    return Vec::loadu(from, N);
  }
}

template <typename T, int64_t N>
inline void store(const at::vec::Vectorized<T>& vector, T* to) {
  if constexpr (N >= at::vec::Vectorized<T>::size()) {
    vector.store(to);
  } else {
    vector.store(to, N);
  }
}

// Memory for N numbers within a function: on the stack where they are few, because a thread may
// have little of it, else on the heap, where each thread keeps one block for each size.
template <typename T, int64_t N>
class PanelMemory {
  static constexpr bool ON_STACK = N * sizeof(T) <= 8192;

 public:
  T* get() {
    if constexpr (ON_STACK) {
      return numbers_;
    } else {
      static thread_local std::unique_ptr<T, decltype(&std::free)> kept(
          static_cast<T*>(std::aligned_alloc(64, (N * sizeof(T) + 63) / 64 * 64)), &std::free);
      if (kept == nullptr) {
        throw std::bad_alloc();
      }
      return kept.get();
    }
  }

 private:
  alignas(64) T numbers_[ON_STACK ? N : 1];
};

// panel[k, n] = b[n * BN + k], for k < K and n < N: the columns of a transposed matrix.
template <typename T, int64_t K, int64_t N, int64_t BN, int64_t LD>
inline void pack_transposed(const T* b, T* panel) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) {
    at::vec::transpose_mxn<float>(b, BN, panel, LD, static_cast<int>(N), static_cast<int>(K));
    return;
  }
#endif
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) {
      panel[k * LD + n] = b[n * BN + k];
    }
  }
}

// R rows of C and N columns, at most V vectors wide; LD is the distance of B's rows.
template <typename T, int R, int64_t N, int64_t K, int64_t AM, int64_t AK, int64_t LD, int64_t CM,
          bool HAS_BIAS, int64_t SM, int64_t SN>
inline void rows(const T* a, const T* b, const T* bias, T* c) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int64_t W = Vec::size();
  constexpr int V = (N + W - 1) / W;
  constexpr int64_t LAST = N - (V - 1) * W;
  Vec sums[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      if constexpr (!HAS_BIAS) {
        sums[r][v] = Vec(T(0));
      } else if constexpr (SN == 1) {
        sums[r][v] = v + 1 < V ? load<T, W>(bias + r * SM + v * W)
                               : load<T, LAST>(bias + r * SM + v * W);
      } else {
        T terms[W] = {};
        for (int64_t n = 0; n < std::min(W, N - v * W); ++n) {
          terms[n] = bias[r * SM + (v * W + n) * SN];
        }
        sums[r][v] = Vec::loadu(terms);
      }
    }
  }
  for (int64_t k = 0; k < K; ++k) {
    Vec row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      row[v] = v + 1 < V ? load<T, W>(b + k * LD + v * W) : load<T, LAST>(b + k * LD + v * W);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec factor(a[r * AM + k * AK]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        sums[r][v] = at::vec::fmadd(factor, row[v], sums[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      if (v + 1 < V) {
        store<T, W>(sums[r][v], c + r * CM + v * W);
      } else {
        store<T, LAST>(sums[r][v], c + r * CM + v * W);
      }
    }
  }
}

template <typename T, int64_t M, int64_t N, int64_t K, int64_t AM, int64_t AK, int64_t BK,
          int64_t BN, int64_t CM, bool HAS_BIAS, int64_t SM, int64_t SN>
inline void panel(const T* a, const T* b, const T* bias, T* c) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int64_t W = Vec::size();
  constexpr int V = (N + W - 1) / W;
#if defined(CPU_CAPABILITY_AVX512)
  constexpr int REGISTERS = 24;
#else
  constexpr int REGISTERS = 12;
#endif
  constexpr int R = REGISTERS / V < 8 ? REGISTERS / V : 8;
  // Contiguous rows of B are read where they are; else the panel is copied first.
  constexpr bool CONTIGUOUS = BN == 1 || N == 1;
  constexpr int64_t LD = CONTIGUOUS ? BK : V * W;
  PanelMemory<T, CONTIGUOUS ? 1 : K * LD> scratch;
  if constexpr (!CONTIGUOUS) {
    T* const copy = scratch.get();
    if constexpr (BK == 1 || K == 1) {
      pack_transposed<T, K, N, BN, LD>(b, copy);
    } else {
      for (int64_t k = 0; k < K; ++k) {
        for (int64_t n = 0; n < N; ++n) {
          copy[k * LD + n] = b[k * BK + n * BN];
        }
      }
    }
    b = copy;
  }
  int64_t m = 0;
  for (; m + R <= M; m += R) {
    rows<T, R, N, K, AM, AK, LD, CM, HAS_BIAS, SM, SN>(a + m * AM, b, bias + m * SM, c + m * CM);
  }
  constexpr int REST = M % R;
  if constexpr (REST > 0) {
    rows<T, REST, N, K, AM, AK, LD, CM, HAS_BIAS, SM, SN>(a + m * AM, b, bias + m * SM,
                                                          c + m * CM);
  }
}

template <typename T, int64_t M, int64_t N, int64_t K, int64_t AM, int64_t AK, int64_t BK,
          int64_t BN, int64_t CM, bool HAS_BIAS, int64_t SM, int64_t SN>
void gemm(const T* a, const T* b, const T* bias, T* c) {
  constexpr int64_t WIDTH = 2 * at::vec::Vectorized<T>::size();
  int64_t n = 0;
  for (; n + WIDTH <= N; n += WIDTH) {
    panel<T, M, WIDTH, K, AM, AK, BK, BN, CM, HAS_BIAS, SM, SN>(a, b + n * BN, bias + n * SN,
                                                                c + n);
  }
  constexpr int64_t REST = N % WIDTH;
  if constexpr (REST > 0) {
    panel<T, M, REST, K, AM, AK, BK, BN, CM, HAS_BIAS, SM, SN>(a, b + n * BN, bias + n * SN, c + n);
  }
}

}  // namespace funcnet

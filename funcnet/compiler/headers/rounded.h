// Products of matrices of bfloat16 or half: summed in float32, and rounded once.
//
// Large ones are cut as in large.h, but with all of B's rows in a panel, so that a block of C stays
// in float32 until its sums are whole. Where the processor multiplies pairs of bfloat16 numbers, the
// packed blocks hold pairs of rows; else they hold float32.

#pragma once

#include <ATen/cpu/vec/functional_bfloat16.h>
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include "headers/gemm.h"
#include "headers/large.h"

namespace funcnet {

template <typename T>
inline void widen(const T* from, int64_t count, float* to) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int64_t HALF = Vec::size() / 2;
  int64_t i = 0;
  for (; i + Vec::size() <= count; i += Vec::size()) {
    const auto [first, second] = at::vec::convert_to_float<T>(Vec::loadu(from + i));
    first.store(to + i);
    second.store(to + i + HALF);
  }
  for (; i < count; ++i) {
    to[i] = static_cast<float>(from[i]);
  }
}

// c[j] = alpha * sums[j] + beta * bias[j * step], rounded.
template <typename T>
inline void finish_row(const float* sums, int64_t count, float alpha, const T* bias, int64_t step,
                       float beta, T* c) {
  using Vec = at::vec::Vectorized<T>;
  using Wide = at::vec::Vectorized<float>;
  constexpr int64_t HALF = Vec::size() / 2;
  int64_t j = 0;
  for (; j + Vec::size() <= count && (bias == nullptr || step <= 1); j += Vec::size()) {
    Wide first = Wide(alpha) * Wide::loadu(sums + j);
    Wide second = Wide(alpha) * Wide::loadu(sums + j + HALF);
    if (bias != nullptr) {
      const Vec terms = step == 1 ? Vec::loadu(bias + j) : Vec(*bias);
      const auto [left, right] = at::vec::convert_to_float<T>(terms);
      first = first + Wide(beta) * left;
      second = second + Wide(beta) * right;
    }
    at::vec::convert_from_float<T>(first, second).store(c + j);
  }
  for (; j < count; ++j) {
    const float term = bias == nullptr ? 0.f : beta * static_cast<float>(bias[j * step]);
    c[j] = static_cast<T>(alpha * sums[j] + term);
  }
}

// A product of constant sizes: its operands as float32, in the order of their memory.
template <typename T, int64_t M, int64_t N, int64_t K, int64_t AM, int64_t AK, int64_t BK,
          int64_t BN, int64_t DM, int64_t DN, int64_t CM>
inline void small_rounded(const T* a, const T* b, const T* bias, T* c, float alpha, float beta) {
  constexpr bool A_TURNED = AK != 1 && AM == 1, B_TURNED = BN != 1 && BK == 1;
  constexpr int64_t A_LINES = A_TURNED ? K : M, A_LINE = A_TURNED ? M : K;
  constexpr int64_t B_LINES = B_TURNED ? N : K, B_LINE = B_TURNED ? K : N;
  struct Number {
    float value;
  };
  // A type of its own, because `gemm` may take memory for as many floats.
  PanelMemory<Number, M * K + K * N + M * N> scratch;
  float* const wide_a = &scratch.get()->value;
  float* const wide_b = wide_a + M * K;
  float* const sums = wide_b + K * N;
  const auto copy = [](const T* x, int64_t lines, int64_t line, int64_t down, int64_t along,
                       float* to) {
    for (int64_t i = 0; i < lines; ++i) {
      if (along == 1) {
        widen(x + i * down, line, to + i * line);
      } else {
        for (int64_t j = 0; j < line; ++j) {
          to[i * line + j] = static_cast<float>(x[i * down + j * along]);
        }
      }
    }
  };
  copy(a, A_LINES, A_LINE, A_TURNED ? AK : AM, A_TURNED ? AM : AK, wide_a);
  copy(b, B_LINES, B_LINE, B_TURNED ? BN : BK, B_TURNED ? BK : BN, wide_b);
  gemm<float, M, N, K, A_TURNED ? 1 : K, A_TURNED ? M : 1, B_TURNED ? 1 : N, B_TURNED ? K : 1, N,
       false, 0, 0>(wide_a, wide_b, nullptr, sums);
  for (int64_t i = 0; i < M; ++i) {
    finish_row(sums + i * N, N, alpha, bias == nullptr ? bias : bias + i * DM, DN, beta,
               c + i * CM);
  }
}

template <typename T>
struct Rounded {
  using Vec = at::vec::Vectorized<float>;
  static constexpr int64_t LANES = Vec::size();
  static constexpr int HEIGHT = Large<float>::HEIGHT;
  static constexpr int64_t WIDTH = 2 * LANES, DEPTH = 512, ROWS = 10 * HEIGHT;
  // So many columns of B are packed at a time.
  static constexpr int64_t COLUMNS = 1024;
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  static constexpr bool PAIRS = std::is_same_v<T, c10::BFloat16>;
#else
  static constexpr bool PAIRS = false;
#endif
  using Packed = std::conditional_t<PAIRS, T, float>;

  // c = strip * panel, plus c where `add` says so; of whole tiles.
  static void tile(const Packed* strip, const Packed* panel, int64_t depth, float* c, int64_t step,
                   bool add) {
    Vec sums[HEIGHT][2];
#pragma GCC unroll 16
    for (int r = 0; r < HEIGHT; ++r) {
      sums[r][0] = add ? Vec::loadu(c + r * step) : Vec(0.f);
      sums[r][1] = add ? Vec::loadu(c + r * step + LANES) : Vec(0.f);
    }
    if constexpr (PAIRS) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
      for (int64_t k = 0; k < depth; k += 2) {
        const auto left = (__m512bh)_mm512_loadu_si512(panel + k * WIDTH);
        const auto right = (__m512bh)_mm512_loadu_si512(panel + k * WIDTH + 2 * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < HEIGHT; ++r) {
          int pair;
          std::memcpy(&pair, strip + k * HEIGHT + 2 * r, sizeof(pair));
          const auto factor = (__m512bh)_mm512_set1_epi32(pair);
          sums[r][0] = _mm512_dpbf16_ps(sums[r][0], factor, left);
          sums[r][1] = _mm512_dpbf16_ps(sums[r][1], factor, right);
        }
      }
#endif
    } else {
      for (int64_t k = 0; k < depth; ++k) {
        const Vec left = Vec::loadu(panel + k * WIDTH);
        const Vec right = Vec::loadu(panel + k * WIDTH + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < HEIGHT; ++r) {
          const Vec factor(strip[k * HEIGHT + r]);
          sums[r][0] = at::vec::fmadd(factor, left, sums[r][0]);
          sums[r][1] = at::vec::fmadd(factor, right, sums[r][1]);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < HEIGHT; ++r) {
      sums[r][0].store(c + r * step);
      sums[r][1].store(c + r * step + LANES);
    }
  }

  static int64_t even(int64_t depth) { return PAIRS ? (depth + 1) / 2 * 2 : depth; }

  // packed[k, i] = x[i * along + k * down] for i < count and k < depth, else 0; with pairs,
  // packed[k / 2, i, k % 2].
  static void pack(const T* x, int64_t along, int64_t down, int64_t count, int64_t width,
                   int64_t depth, Packed* packed) {
    const int64_t whole = even(depth);
    if constexpr (PAIRS) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
      if (down == 1 && along % 2 == 0) {
        // Pairs lie side by side: they move as floats would.
        if (count < width || whole > depth) {
          std::memset(packed, 0, whole * width * sizeof(T));
        }
        at::vec::transpose_mxn<float>(reinterpret_cast<const float*>(x), along / 2,
                                      reinterpret_cast<float*>(packed), width,
                                      static_cast<int>(count), static_cast<int>(depth / 2));
        for (int64_t i = 0; i < count && whole > depth; ++i) {
          packed[(depth / 2 * width + i) * 2] = x[i * along + depth - 1];
        }
        return;
      }
      if (along == 1) {
        const auto read = [&](int64_t k, int64_t i) {
          const int64_t lanes = k < depth ? std::clamp<int64_t>(count - i, 0, LANES) : 0;
          return _mm512_cvtepu16_epi32(
              _mm256_maskz_loadu_epi16((1u << lanes) - 1, x + k * down + i));
        };
        for (int64_t k = 0; k < depth; k += 2) {
          for (int64_t i = 0; i < width; i += LANES) {
            const __m512i pairs =
                _mm512_or_si512(read(k, i), _mm512_slli_epi32(read(k + 1, i), 16));
            _mm512_mask_storeu_epi32(packed + k * width + 2 * i,
                                     (1u << std::min(LANES, width - i)) - 1, pairs);
          }
        }
        return;
      }
#endif
      for (int64_t start = 0; start < whole; start += 16) {
        const int64_t stop = std::min(whole, start + 16);
        for (int64_t i = 0; i < width; ++i) {
          for (int64_t k = start; k < stop; ++k) {
            packed[(k / 2 * width + i) * 2 + k % 2] =
                i < count && k < depth ? x[i * along + k * down] : T(0.f);
          }
        }
      }
    } else {
      if (along == 1 && count == width) {
        for (int64_t k = 0; k < depth; ++k) {
          widen(x + k * down, width, packed + k * width);
        }
        return;
      }
      for (int64_t start = 0; start < depth; start += 16) {
        const int64_t stop = std::min(depth, start + 16);
        for (int64_t i = 0; i < width; ++i) {
          for (int64_t k = start; k < stop; ++k) {
            packed[k * width + i] = i < count ? static_cast<float>(x[i * along + k * down]) : 0.f;
          }
        }
      }
    }
  }

  static void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t am, int64_t ak,
                      const T* b, int64_t bk, int64_t bn, const T* bias, int64_t dm, int64_t dn,
                      T* c, int64_t cm, float alpha, float beta, int threads) {
    for (int64_t n0 = 0; n0 < n; n0 += COLUMNS) {
      columns(m, std::min(COLUMNS, n - n0), k, a, am, ak, b + n0 * bn, bk, bn,
              bias == nullptr ? bias : bias + n0 * dn, dm, dn, c + n0, cm, alpha, beta, threads);
    }
  }

  static void columns(int64_t m, int64_t n, int64_t k, const T* a, int64_t am, int64_t ak,
                      const T* b, int64_t bk, int64_t bn, const T* bias, int64_t dm, int64_t dn,
                      T* c, int64_t cm, float alpha, float beta, int threads) {
    const int64_t panels = (n + WIDTH - 1) / WIDTH, strips = (m + HEIGHT - 1) / HEIGHT;
    const int64_t rows = std::min(ROWS, strips * HEIGHT), step = panels * WIDTH;
    Packed* const packed_b = Large<Packed>::buffer(step * even(k));
    Packed* const packed_a = Large<Packed>::buffer(threads * rows * DEPTH);
    float* const sums = Large<float>::buffer(threads * rows * step);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      Packed* const own = packed_a + omp_get_thread_num() * rows * DEPTH;
      float* const block = sums + omp_get_thread_num() * rows * step;
#pragma omp for schedule(static)
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t j = panel * WIDTH;
        for (int64_t top = 0; top < k; top += DEPTH) {
          pack(b + top * bk + j * bn, bn, bk, std::min(WIDTH, n - j), WIDTH,
               std::min(DEPTH, k - top), packed_b + j * even(k) + top * WIDTH);
        }
      }
      // Threads divide the strips; the panels, if there are few strips.
      using Range = typename Large<float>::Range;
      const bool by_rows = strips >= 4 * omp_get_num_threads();
      const Range lines = by_rows ? Large<float>::part(strips) : Range{0, strips};
      const Range across = by_rows ? Range{0, panels} : Large<float>::part(panels);
      const int64_t left = across.start * WIDTH, right = std::min(n, across.stop * WIDTH);
      for (int64_t first = lines.start; first < lines.stop; first += rows / HEIGHT) {
        const int64_t m0 = first * HEIGHT;
        const int64_t height = std::min(std::min(rows, m - m0), (lines.stop - first) * HEIGHT);
        for (int64_t top = 0; top < k && left < right; top += DEPTH) {
          const int64_t depth = std::min(DEPTH, k - top);
          for (int64_t i = 0; i < height; i += HEIGHT) {
            pack(a + (m0 + i) * am + top * ak, am, ak, std::min<int64_t>(HEIGHT, height - i),
                 HEIGHT, depth, own + i * even(depth));
          }
          for (int64_t panel = across.start; panel < across.stop; ++panel) {
            const int64_t j = panel * WIDTH;
            for (int64_t i = 0; i < height; i += HEIGHT) {
              tile(own + i * even(depth), packed_b + j * even(k) + top * WIDTH, depth,
                   block + i * step + j, step, top > 0);
            }
          }
        }
        for (int64_t i = 0; i < height && left < right; ++i) {
          finish_row(block + i * step + left, right - left, alpha,
                     bias == nullptr ? bias : bias + (m0 + i) * dm + left * dn, dn, beta,
                     c + (m0 + i) * cm + left);
        }
      }
    }
    std::free(sums);
    std::free(packed_a);
    std::free(packed_b);
  }
};

}  // namespace funcnet

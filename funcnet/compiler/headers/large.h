// Products of large matrices, with strides that are known when they run.
//
// After Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008: DEPTH
// rows of B are packed into panels of WIDTH columns, blocks of A into strips of HEIGHT rows, and a
// strip times a panel stays in registers. Threads share the packed panels.

#pragma once

#include <ATen/cpu/vec/vec.h>
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <omp.h>

namespace funcnet {

template <typename T>
struct Large {
  using Vec = at::vec::Vectorized<T>;
  static constexpr int64_t LANES = Vec::size();
#if defined(CPU_CAPABILITY_AVX512)
  static constexpr int HEIGHT = 12;
#else
  static constexpr int HEIGHT = 6;
#endif
  static constexpr int64_t WIDTH = 2 * LANES;
  static constexpr int64_t DEPTH = 256;
  static constexpr int64_t ROWS = 10 * HEIGHT;

  // c (+)= strip * panel, where `add` says that c holds a sum already.
  static void tile(const T* strip, const T* panel, int64_t depth, T* c, int64_t step, bool add) {
    Vec sums[HEIGHT][2];
#pragma GCC unroll 16
    for (int r = 0; r < HEIGHT; ++r) {
      sums[r][0] = add ? Vec::loadu(c + r * step) : Vec(T(0));
      sums[r][1] = add ? Vec::loadu(c + r * step + LANES) : Vec(T(0));
    }
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
#pragma GCC unroll 16
    for (int r = 0; r < HEIGHT; ++r) {
      sums[r][0].store(c + r * step);
      sums[r][1].store(c + r * step + LANES);
    }
  }

  // packed[k, i] = x[i * along + k * down] for i < count, and 0 up to width.
  static void pack(const T* x, int64_t along, int64_t down, int64_t count, int64_t width,
                   int64_t depth, T* packed) {
    if (along == 1 && count == width) {
      for (int64_t k = 0; k < depth; ++k) {
        std::memcpy(packed + k * width, x + k * down, width * sizeof(T));
      }
      return;
    }
    // Lines of x are read in short runs, so that both sides stay in the cache.
    for (int64_t start = 0; start < depth; start += 16) {
      const int64_t stop = std::min(depth, start + 16);
      for (int64_t i = 0; i < width; ++i) {
        for (int64_t k = start; k < stop; ++k) {
          packed[k * width + i] = i < count ? x[i * along + k * down] : T(0);
        }
      }
    }
  }

  static T* buffer(size_t count) {
    void* found = std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64);
    if (found == nullptr) {
      throw std::bad_alloc();
    }
    return static_cast<T*>(found);
  }

  struct Range {
    int64_t start, stop;
  };

  // What this thread does of so many things.
  static Range part(int64_t count) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return {count * thread / threads, count * (thread + 1) / threads};
  }

  static void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t am, int64_t ak,
                      const T* b, int64_t bk, int64_t bn, const T* bias, int64_t sm, int64_t sn,
                      T* c, int64_t cm, int threads) {
    const int64_t panels = (n + WIDTH - 1) / WIDTH, strips = (m + HEIGHT - 1) / HEIGHT;
    T* const packed_b = buffer(panels * WIDTH * std::min(k, DEPTH));
    T* const packed_a = buffer(threads * ROWS * DEPTH);
    for (int64_t top = 0; top < k; top += DEPTH) {
      const int64_t depth = std::min(DEPTH, k - top);
      const bool add = top > 0 || bias != nullptr;
#pragma omp parallel num_threads(threads) if (threads > 1)
      {
        T* const own = packed_a + omp_get_thread_num() * ROWS * DEPTH;
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels; ++panel) {
          const int64_t n0 = panel * WIDTH;
          pack(b + top * bk + n0 * bn, bn, bk, std::min(WIDTH, n - n0), WIDTH, depth,
               packed_b + n0 * depth);
        }
        // Threads divide the strips; the panels, if there are few strips.
        const bool by_rows = strips >= 4 * omp_get_num_threads();
        const Range lines = by_rows ? part(strips) : Range{0, strips};
        const Range columns = by_rows ? Range{0, panels} : part(panels);
        for (int64_t first = lines.start; first < lines.stop; first += ROWS / HEIGHT) {
          const int64_t m0 = first * HEIGHT;
          const int64_t height = std::min(std::min(ROWS, m - m0), (lines.stop - first) * HEIGHT);
          for (int64_t i = 0; i < height; i += HEIGHT) {
            pack(a + (m0 + i) * am + top * ak, am, ak, std::min<int64_t>(HEIGHT, height - i),
                 HEIGHT, depth, own + i * depth);
          }
          if (top == 0 && bias != nullptr) {
            for (int64_t i = m0; i < m0 + height; ++i) {
              for (int64_t j = columns.start * WIDTH; j < std::min(n, columns.stop * WIDTH); ++j) {
                c[i * cm + j] = bias[i * sm + j * sn];
              }
            }
          }
          for (int64_t panel = columns.start; panel < columns.stop; ++panel) {
            const int64_t n0 = panel * WIDTH, width = std::min(WIDTH, n - n0);
            for (int64_t i = 0; i < height; i += HEIGHT) {
              const int64_t rows = std::min<int64_t>(HEIGHT, height - i);
              T* const corner = c + (m0 + i) * cm + n0;
              if (rows == HEIGHT && width == WIDTH) {
                tile(own + i * depth, packed_b + n0 * depth, depth, corner, cm, add);
                continue;
              }
              T padded[HEIGHT * WIDTH];
              tile(own + i * depth, packed_b + n0 * depth, depth, padded, WIDTH, false);
              for (int64_t r = 0; r < rows; ++r) {
                for (int64_t j = 0; j < width; ++j) {
                  corner[r * cm + j] = padded[r * WIDTH + j] + (add ? corner[r * cm + j] : T(0));
                }
              }
            }
          }
        }
      }
    }
    std::free(packed_a);
    std::free(packed_b);
  }
};

}  // namespace funcnet

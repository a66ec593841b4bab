// What jit's programs are made of beside Inductor's kernels.

#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <omp.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

namespace funcnet {

// What went wrong in a loop that threads share, which no exception may leave, until it is over.
class Failure {
 public:
  void keep(const std::exception& error) {
#pragma omp critical
    message = error.what();
  }
  void rethrow() const {
    if (!message.empty()) {
      throw std::runtime_error(message);
    }
  }

 private:
  std::string message;
};

// Products of small matrices whose shapes and strides are known when they are compiled.
//
// C[m, n] = bias[m, n] + sum_k A[m, k] B[k, n], with any strides of A, B and bias, and C in rows.
// A call of a BLAS library costs more than such a product takes; here all loops have constant
// bounds and the sums stay in registers. Columns are cut into panels of V vectors; a panel of B is
// copied into rows where it does not lie so.

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

// Memory for N numbers within a function: on the stack where they are few, because a thread may have
// little of it, else on the heap, where each thread keeps one block for each size.
template <typename T, int64_t N>
class Scratch {
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
  // Rows of B are read where they lie if that is cheap; else the panel is copied first.
  constexpr bool IN_ROWS = BN == 1 || N == 1;
  constexpr int64_t LD = IN_ROWS ? BK : V * W;
  Scratch<T, IN_ROWS ? 1 : K * LD> scratch;
  if constexpr (!IN_ROWS) {
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

// Products of large matrices, with strides that are known when they run.
//
// After Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008: DEPTH rows
// of B are packed into panels of WIDTH columns, blocks of A into strips of HEIGHT rows, and a strip
// times a panel stays in registers. Threads share the panels and divide the rows among them.
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

  static void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t am, int64_t ak,
                      const T* b, int64_t bk, int64_t bn, const T* bias, int64_t sm, int64_t sn,
                      T* c, int64_t cm, int threads) {
    const int64_t panels = (n + WIDTH - 1) / WIDTH, blocks = (m + ROWS - 1) / ROWS;
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
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t m0 = block * ROWS, height = std::min(ROWS, m - m0);
          for (int64_t i = 0; i < height; i += HEIGHT) {
            pack(a + (m0 + i) * am + top * ak, am, ak, std::min<int64_t>(HEIGHT, height - i),
                 HEIGHT, depth, own + i * depth);
          }
          if (top == 0 && bias != nullptr) {
            for (int64_t i = m0; i < m0 + height; ++i) {
              for (int64_t j = 0; j < n; ++j) {
                c[i * cm + j] = bias[i * sm + j * sn];
              }
            }
          }
          for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t n0 = panel * WIDTH, width = std::min(WIDTH, n - n0);
            for (int64_t i = 0; i < height; i += HEIGHT) {
              const int64_t rows = std::min<int64_t>(HEIGHT, height - i);
              T* const corner = c + (m0 + i) * cm + n0;
              if (rows == HEIGHT && width == WIDTH) {
                tile(own + i * depth, packed_b + n0 * depth, depth, corner, cm, add);
                continue;
              }
              T part[HEIGHT * WIDTH];
              tile(own + i * depth, packed_b + n0 * depth, depth, part, WIDTH, false);
              for (int64_t r = 0; r < rows; ++r) {
                for (int64_t j = 0; j < width; ++j) {
                  corner[r * cm + j] = part[r * WIDTH + j] + (add ? corner[r * cm + j] : T(0));
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

// Threefry-2x32 with 20 rounds of the 64-bit counters start ... start + n - 1, or of `counter`; see
// funcnet/random.py. A vector holds LANES counters.
inline void threefry(const int64_t* key, const int32_t* counter, int64_t start, int64_t n,
                     int32_t* out0, int32_t* out1) {
  constexpr int LANES = 16;
  typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
  const uint32_t k0 = static_cast<uint32_t>(key[0]), k1 = static_cast<uint32_t>(key[1]);
  const uint32_t schedule[3] = {k0, k1, k0 ^ k1 ^ 0x1BD11BDAu};
  constexpr int rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  for (int64_t i = 0; i < n; i += LANES) {
    const int64_t count = n - i < LANES ? n - i : LANES;
    Words x0, x1;
    for (int lane = 0; lane < LANES; ++lane) {
      const uint64_t place = static_cast<uint64_t>(start + i + lane);
      x0[lane] = counter == nullptr ? static_cast<uint32_t>(place >> 32) : 0;
      x1[lane] = counter == nullptr ? static_cast<uint32_t>(place)
                 : lane < count     ? static_cast<uint32_t>(counter[i + lane])
                                    : 0;
    }
    x0 += k0;
    x1 += k1;
#pragma GCC unroll 5
    for (int group = 0; group < 5; ++group) {
#pragma GCC unroll 4
      for (int round = 0; round < 4; ++round) {
        const int rotation = rotations[group % 2][round];
        x0 += x1;
        x1 = (x1 << rotation | x1 >> (32 - rotation)) ^ x0;
      }
      x0 += schedule[(group + 1) % 3];
      x1 += schedule[(group + 2) % 3] + static_cast<uint32_t>(group + 1);
    }
    if (out0 != nullptr) {
      std::memcpy(out0 + i, &x0, count * sizeof(int32_t));
    }
    if (out1 != nullptr) {
      std::memcpy(out1 + i, &x1, count * sizeof(int32_t));
    }
  }
}

// A number's order as an unsigned one: NaN is the greatest, as torch sorts it.
template <typename T>
inline uint64_t rank(T value) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(value)) {
      return ~uint64_t(0);
    }
    double wide = value == 0 ? 0.0 : static_cast<double>(value);
    uint64_t bits;
    std::memcpy(&bits, &wide, sizeof(bits));
    return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
  } else {
    return static_cast<uint64_t>(static_cast<int64_t>(value)) ^ uint64_t(1) << 63;
  }
}

// A stable sort of `outer` times `inner` lines of N numbers that lie `inner` apart: by bytes of
// their rank from the last to the first, without those that are the same in all.
template <typename T>
void sort(const T* x, T* values, int64_t* indices, int64_t outer, int64_t n, int64_t inner,
          bool descending) {
  struct Entry {
    uint64_t rank;
    int64_t index;
  };
  std::vector<Entry> entries(n), sorted(n);
  for (int64_t line = 0; line < outer * inner; ++line) {
    const int64_t start = line / inner * n * inner + line % inner;
    uint64_t any = 0, all = ~uint64_t(0);
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t found = rank(x[start + i * inner]);
      entries[i] = {descending ? ~found : found, i};
      any |= entries[i].rank;
      all &= entries[i].rank;
    }
    for (int shift = 0; shift < 64; shift += 8) {
      if (((any ^ all) >> shift & 255) == 0) {
        continue;
      }
      std::array<int64_t, 257> begin{};
      for (const Entry& entry : entries) {
        ++begin[(entry.rank >> shift & 255) + 1];
      }
      for (int digit = 0; digit < 256; ++digit) {
        begin[digit + 1] += begin[digit];
      }
      for (const Entry& entry : entries) {
        sorted[begin[entry.rank >> shift & 255]++] = entry;
      }
      entries.swap(sorted);
    }
    for (int64_t i = 0; i < n; ++i) {
      if (values != nullptr) {
        values[start + i * inner] = x[start + entries[i].index * inner];
      }
      if (indices != nullptr) {
        indices[start + i * inner] = entries[i].index;
      }
    }
  }
}

// A tensor in memory of ours, for an operator of torch; or none.
class Borrowed {
 public:
  Borrowed() = default;
  Borrowed(const char* data, std::vector<int64_t> sizes, int32_t dtype) : sizes_(std::move(sizes)) {
    std::vector<int64_t> strides(sizes_.size(), 1);
    for (size_t axis = sizes_.size(); axis-- > 1;) {
      strides[axis - 1] = strides[axis] * std::max<int64_t>(sizes_[axis], 1);
    }
    check(aoti_torch_create_tensor_from_blob(const_cast<char*>(data), sizes_.size(), sizes_.data(),
                                             strides.data(), 0, dtype,
                                             aoti_torch_device_type_cpu(), 0, &handle_));
  }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  ~Borrowed() {
    if (handle_ != nullptr) {
      aoti_torch_delete_tensor_object(handle_);
    }
  }
  explicit operator bool() const { return handle_ != nullptr; }
  AtenTensorHandle get() const { return handle_; }
  const std::vector<int64_t>& sizes() const { return sizes_; }
  // Copy what an operator returned into this memory.
  void take(AtenTensorHandle result) const {
    if (handle_ != nullptr && result != nullptr) {
      check(aoti_torch_copy_(handle_, result, 0));
    }
    if (result != nullptr) {
      aoti_torch_delete_tensor_object(result);
    }
  }
  static void check(AOTITorchError error) {
    if (error != AOTI_TORCH_SUCCESS) {
      throw std::runtime_error("an operator of torch failed; its message is on stderr");
    }
  }

 private:
  AtenTensorHandle handle_ = nullptr;
  std::vector<int64_t> sizes_;
};

struct Window {
  std::vector<int64_t> stride, padding, dilation, output_padding;
  bool transposed;
  int64_t groups;
};

inline void convolution(const Borrowed& x, const Borrowed& weight, const Borrowed& bias,
                        const Borrowed& y, const Window& window) {
  AtenTensorHandle given = bias.get(), result = nullptr;
  Borrowed::check(aoti_torch_cpu_convolution(
      x.get(), weight.get(), bias ? &given : nullptr, window.stride.data(), window.stride.size(),
      window.padding.data(), window.padding.size(), window.dilation.data(), window.dilation.size(),
      window.transposed, window.output_padding.data(), window.output_padding.size(), window.groups,
      &result));
  y.take(result);
}

inline void convolution_backward(const Borrowed& dy, const Borrowed& x, const Borrowed& weight,
                                 const Borrowed& dx, const Borrowed& dweight, const Borrowed& dbias,
                                 const Window& window) {
  const int64_t* sizes = dbias.sizes().data();
  const int32_t mask[3] = {bool(dx), bool(dweight), bool(dbias)};
  AtenTensorHandle results[3] = {nullptr, nullptr, nullptr};
  Borrowed::check(aoti_torch_cpu_convolution_backward(
      dy.get(), x.get(), weight.get(), dbias ? &sizes : nullptr, dbias.sizes().size(),
      window.stride.data(), window.stride.size(), window.padding.data(), window.padding.size(),
      window.dilation.data(), window.dilation.size(), window.transposed,
      window.output_padding.data(), window.output_padding.size(), window.groups, mask, 3,
      &results[0], &results[1], &results[2]));
  dx.take(results[0]);
  dweight.take(results[1]);
  dbias.take(results[2]);
}

}  // namespace funcnet

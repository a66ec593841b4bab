// Threefry-2x32 with 20 rounds of the 64-bit counters start ... start + n - 1, or of `counter`;
// funcnet/threefry.py has the same in Python. A vector holds LANES counters.

#pragma once

#include <cstdint>
#include <cstring>

namespace funcnet {

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
      const uint64_t index = static_cast<uint64_t>(start + i + lane);
      x0[lane] = counter == nullptr ? static_cast<uint32_t>(index >> 32) : 0;
      x1[lane] = counter == nullptr ? static_cast<uint32_t>(index)
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

// Those of `n` counters from each of `starts` numbers on.
inline void threefry_from(const int64_t* key, const int64_t* start, int64_t starts, int64_t n,
                          int32_t* out0, int32_t* out1) {
  for (int64_t i = 0; i < starts; ++i) {
    threefry(key, nullptr, start[i], n, out0 == nullptr ? nullptr : out0 + i * n,
             out1 == nullptr ? nullptr : out1 + i * n);
  }
}

}  // namespace funcnet

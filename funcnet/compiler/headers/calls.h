// Calls out of a program, into Python, for operators that have no kernel.

#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>

namespace funcnet {

// Takes the number of a call, and where its operands and results lie; not 0 if it failed.
using Callback = int (*)(int, const char* const*);

// Whether a factorization of a stack of matrices failed.
inline bool any(const char* numbers, int64_t count) {
  const auto* const infos = reinterpret_cast<const int32_t*>(numbers);
  return std::any_of(infos, infos + count, [](int32_t info) { return info != 0; });
}

inline void call(Callback callback, int number, std::initializer_list<const char*> addresses) {
  if (callback(number, addresses.begin())) {
    throw std::runtime_error("a call failed");
  }
}

}  // namespace funcnet

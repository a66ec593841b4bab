// Calls out of a program, into Python, for operators that have no kernel.

#pragma once

#include <initializer_list>
#include <stdexcept>

namespace funcnet {

// Takes the number of a call, and where its operands and results lie; not 0 if it failed.
using Callback = int (*)(int, const char* const*);

inline void call(Callback callback, int number, std::initializer_list<const char*> addresses) {
  if (callback(number, addresses.begin())) {
    throw std::runtime_error("a call failed");
  }
}

}  // namespace funcnet

// What every program has: its error message and its workspace.

#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "headers/failure.h"

static thread_local std::string message;
extern "C" const char* funcnet_error() { return message.c_str(); }
static int fail(const char* what) { message = what; return 1; }

// Memory for intermediate values. A program keeps it from call to call, unless it is larger than KEPT:
// the kernel would have to map its pages again, and clear them. A call takes it, and another call at
// the same time takes memory of its own. The namespace has no name so that each program keeps its
// own: those of other programs have other sizes.
namespace {
struct Workspace {
  static constexpr size_t KEPT = size_t(1) << 30;
  static inline std::atomic<char*> kept = nullptr;
  char* start;
  bool keep;
  explicit Workspace(size_t size) : start(kept.exchange(nullptr)), keep(size <= KEPT) {
    if (start == nullptr) { start = get(size); }
  }
  ~Workspace() {
    char* none = nullptr;
    if (!keep || !kept.compare_exchange_strong(none, start)) { std::free(start); }
  }
  static char* get(size_t size) {
    void* found = std::aligned_alloc(64, (size + 127) / 64 * 64);
    if (found == nullptr) { throw std::runtime_error("out of memory"); }
    return static_cast<char*>(found);
  }
};
void (*clear_more)() = nullptr;  // what else a program keeps
}  // namespace
extern "C" void funcnet_clear() {
  std::free(Workspace::kept.exchange(nullptr));
  if (clear_more != nullptr) { clear_more(); }
}

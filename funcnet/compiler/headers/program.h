// What every program has: its error message, its workspace, errors in loops that threads share.

#pragma once

#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include <omp.h>

static thread_local std::string message;
extern "C" const char* funcnet_error() { return message.c_str(); }
static int fail(const char* what) { message = what; return 1; }

namespace funcnet {

// The error of an iteration of a parallel loop, kept until the loop is done: no exception may leave
// it.
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

}  // namespace funcnet

// Memory for intermediate values. Little of it is kept by the thread from call to call. The namespace
// has no name so that each program keeps its own: those of other programs have other sizes.
namespace {
struct Workspace {
  static constexpr size_t KEPT = 1 << 24;
  char* start;
  char* owned = nullptr;
  explicit Workspace(size_t size) {
    static thread_local struct Kept {
      char* start = nullptr;
      ~Kept() { std::free(start); }
    } kept;
    if (size <= KEPT) {
      if (kept.start == nullptr) { kept.start = get(size); }
      start = kept.start;
    } else {
      start = owned = get(size);
    }
  }
  ~Workspace() { std::free(owned); }
  static char* get(size_t size) {
    void* found = std::aligned_alloc(64, (size + 127) / 64 * 64);
    if (found == nullptr) { throw std::runtime_error("out of memory"); }
    return static_cast<char*>(found);
  }
};
}  // namespace

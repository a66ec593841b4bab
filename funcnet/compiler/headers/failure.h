// Errors in loops that threads share.

#pragma once

#include <exception>
#include <stdexcept>
#include <string>

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

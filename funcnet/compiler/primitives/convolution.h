// Convolutions of PyTorch on memory of a program.

#pragma once

#include <cstdint>
#include <vector>
#include "headers/borrowed.h"

namespace funcnet {

struct Window {
  std::vector<int64_t> stride, padding, dilation, output_padding;
  bool transposed;
  int64_t groups;
};

inline void convolution(const Borrowed& x, const Borrowed& weight, const Borrowed& bias,
                        const Borrowed& y, const Window& window) {
  const Recycling recycling({y.offer()});
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
  const Recycling recycling({dx.offer(), dweight.offer(), dbias.offer()});
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

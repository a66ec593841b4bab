// Maxima over windows of images, and where they came from.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include <omp.h>

#include "headers/lines.h"

namespace funcnet {

// Along height and along width: the size of x, of y, of the window, and its step, padding, dilation.
struct Pooling {
  int64_t in[2], out[2], size[2], stride[2], padding[2], dilation[2];
};

template <typename T>
constexpr T least() {
  using Limits = std::numeric_limits<T>;
  return Limits::has_infinity ? -Limits::infinity() : Limits::lowest();
}

// y[h, w] = the first maximum of the window at (h, w), or its first NaN, and its index in the image.
template <typename T>
void max_pool_image(const T* x, T* y, int64_t* indices, const Pooling& p) {
  const int64_t width = p.out[1];
  for (int64_t h = 0; h < p.out[0]; ++h, y += width, indices += width) {
    const int64_t top = h * p.stride[0] - p.padding[0];
    // A window of nothing but -infinity gives the first index that is inside.
    const int64_t rows_outside = std::max<int64_t>(0, (-top + p.dilation[0] - 1) / p.dilation[0]);
    const int64_t first_row = top + rows_outside * p.dilation[0];
    for (int64_t w = 0; w < width; ++w) {
      const int64_t left = w * p.stride[1] - p.padding[1];
      const int64_t columns_outside =
          std::max<int64_t>(0, (-left + p.dilation[1] - 1) / p.dilation[1]);
      y[w] = least<T>();
      indices[w] = first_row * p.in[1] + left + columns_outside * p.dilation[1];
    }
    for (int64_t i = 0; i < p.size[0]; ++i) {
      const int64_t row = top + i * p.dilation[0];
      if (row < 0 || row >= p.in[0]) {
        continue;
      }
      for (int64_t j = 0; j < p.size[1]; ++j) {
        // The windows of which this column lies within the image.
        const int64_t shift = j * p.dilation[1] - p.padding[1], step = p.stride[1];
        const int64_t begin = shift < 0 ? (-shift + step - 1) / step : 0;
        const int64_t end = shift >= p.in[1] ? 0 : std::min(width, (p.in[1] - 1 - shift) / step + 1);
        const int64_t start = row * p.in[1] + shift;
        for (int64_t w = begin; w < end; ++w) {
          const T value = x[start + w * step];
          const bool greater = value > y[w] || value != value;
          y[w] = greater ? value : y[w];
          indices[w] = greater ? start + w * step : indices[w];
        }
      }
    }
  }
}

template <typename T>
void max_pool2d(const T* x, T* y, int64_t* indices, int64_t images, const Pooling& p) {
  const int64_t in = p.in[0] * p.in[1], out = p.out[0] * p.out[1];
#pragma omp parallel if (!omp_in_parallel() && images * in > 1 << 15)
  {
    std::vector<T> no_y(y == nullptr ? out : 0);
    std::vector<int64_t> no_indices(indices == nullptr ? out : 0);
#pragma omp for
    for (int64_t image = 0; image < images; ++image) {
      max_pool_image(x + image * in, y == nullptr ? no_y.data() : y + image * out,
                     indices == nullptr ? no_indices.data() : indices + image * out, p);
    }
  }
}

// The windows of one line of y, with channels last: `best` has a place for each channel.
template <typename T>
FUNCNET_VECTORS void max_pool_line(const T* x, T* y, int64_t* indices, int32_t* best, int64_t line,
                                   int64_t channels, const Pooling& p) {
  const int64_t top = line * p.stride[0] - p.padding[0];
  for (int64_t w = 0; w < p.out[1]; ++w, y += channels, indices += channels) {
    const int64_t left = w * p.stride[1] - p.padding[1];
    bool first = true;
    for (int64_t i = 0; i < p.size[0]; ++i) {
      const int64_t row = top + i * p.dilation[0];
      for (int64_t j = 0; j < p.size[1]; ++j) {
        const int64_t column = left + j * p.dilation[1];
        if (row < 0 || row >= p.in[0] || column < 0 || column >= p.in[1]) {
          continue;
        }
        const int32_t index = row * p.in[1] + column;
        const T* const values = x + index * channels;
        if (first) {
          std::fill_n(y, channels, least<T>());
          std::fill_n(best, channels, index);
          first = false;
        }
        for (int64_t c = 0; c < channels; ++c) {
          const T value = values[c];
          const bool greater = value > y[c] || value != value;
          y[c] = greater ? value : y[c];
          best[c] = greater ? index : best[c];
        }
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      indices[c] = best[c];
    }
  }
}

template <typename T>
void max_pool2d_of_last(const T* x, T* y, int64_t* indices, int64_t images, int64_t channels,
                        const Pooling& p) {
  const int64_t in = p.in[0] * p.in[1] * channels, width = p.out[1] * channels;
#pragma omp parallel if (!omp_in_parallel() && images * in > 1 << 15)
  {
    std::vector<int32_t> best(channels);
    std::vector<T> no_y(y == nullptr ? width : 0);
    std::vector<int64_t> no_indices(indices == nullptr ? width : 0);
#pragma omp for
    for (int64_t line = 0; line < images * p.out[0]; ++line) {
      max_pool_line(x + line / p.out[0] * in, y == nullptr ? no_y.data() : y + line * width,
                    indices == nullptr ? no_indices.data() : indices + line * width, best.data(),
                    line % p.out[0], channels, p);
    }
  }
}

// dx[i] = the sum of dy where the maximum was x[i], in the order of dy; channels are last.
template <typename T>
void max_pool2d_backward(const T* dy, const int64_t* indices, T* dx, int64_t images,
                         int64_t channels, int64_t in, int64_t out) {
#pragma omp parallel for if (!omp_in_parallel() && images * in * channels > 1 << 15)
  for (int64_t image = 0; image < images; ++image) {
    T* const sums = dx + image * in * channels;
    std::fill_n(sums, in * channels, T(0));
    for (int64_t i = image * out * channels; i < (image + 1) * out * channels; i += channels) {
      for (int64_t c = 0; c < channels; ++c) {
        sums[indices[i + c] * channels + c] += dy[i + c];
      }
    }
  }
}

}  // namespace funcnet

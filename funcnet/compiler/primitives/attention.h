// Flash attention of PyTorch on memory of a program.

#pragma once

#include "headers/borrowed.h"

namespace funcnet {

inline void attention(const Borrowed& query, const Borrowed& key, const Borrowed& value,
                      const Borrowed& mask, const Borrowed& y, const Borrowed& logsumexp,
                      bool is_causal, double scale) {
  const Recycling recycling({y.offer(), logsumexp.offer()});
  AtenTensorHandle given = mask.get(), results[2] = {nullptr, nullptr};
  Borrowed::check(aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu(
      query.get(), key.get(), value.get(), 0.0, is_causal, mask ? &given : nullptr, &scale,
      &results[0], &results[1]));
  y.take(results[0]);
  logsumexp.take(results[1]);
}

inline void attention_backward(const Borrowed& dy, const Borrowed& query, const Borrowed& key,
                               const Borrowed& value, const Borrowed& y, const Borrowed& logsumexp,
                               const Borrowed& mask, const Borrowed& dquery, const Borrowed& dkey,
                               const Borrowed& dvalue, bool is_causal, double scale) {
  const Recycling recycling({dquery.offer(), dkey.offer(), dvalue.offer()});
  AtenTensorHandle given = mask.get(), results[3] = {nullptr, nullptr, nullptr};
  Borrowed::check(aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu_backward(
      dy.get(), query.get(), key.get(), value.get(), y.get(), logsumexp.get(), 0.0, is_causal,
      mask ? &given : nullptr, &scale, &results[0], &results[1], &results[2]));
  dquery.take(results[0]);
  dkey.take(results[1]);
  dvalue.take(results[2]);
}

}  // namespace funcnet

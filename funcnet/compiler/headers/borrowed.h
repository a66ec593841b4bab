// Tensors of PyTorch in memory of a program, for what PyTorch's own operators compute there.

#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>
#include "headers/recycle.h"
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

namespace funcnet {

// A tensor in memory of ours, for an operator of torch; or none.
class Borrowed {
 public:
  Borrowed() = default;
  Borrowed(const char* data, std::vector<int64_t> sizes, std::vector<int64_t> strides,
           int32_t dtype)
      : data_(const_cast<char*>(data)),
        sizes_(std::move(sizes)),
        strides_(std::move(strides)),
        dtype_(dtype) {
    handle_ = tensor(data_, strides_.data());
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
  Offer offer() const { return {data_, bytes()}; }
  // Have what an operator returned in this memory, where it may be already.
  void take(AtenTensorHandle result) const {
    if (handle_ != nullptr && result != nullptr) {
      void* made = nullptr;
      int64_t* strides = nullptr;
      check(aoti_torch_get_data_ptr(result, &made));
      check(aoti_torch_get_strides(result, &strides));
      if (made != data_) {
        check(aoti_torch_copy_(handle_, result, 0));
      } else if (!std::equal(strides_.begin(), strides_.end(), strides)) {
        // In another order: through a copy.
        std::vector<char> copy(data_, data_ + bytes());
        AtenTensorHandle ordered = tensor(copy.data(), strides);
        check(aoti_torch_copy_(handle_, ordered, 0));
        aoti_torch_delete_tensor_object(ordered);
      }
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
  AtenTensorHandle tensor(void* data, const int64_t* strides) const {
    AtenTensorHandle made = nullptr;
    check(aoti_torch_create_tensor_from_blob(data, sizes_.size(), sizes_.data(), strides, 0, dtype_,
                                             aoti_torch_device_type_cpu(), 0, &made));
    return made;
  }
  size_t bytes() const {
    size_t count = data_ == nullptr ? 0 : aoti_torch_dtype_element_size(dtype_);
    for (const int64_t size : sizes_) {
      count *= size;
    }
    return count;
  }

  char* data_ = nullptr;
  std::vector<int64_t> sizes_, strides_;
  int32_t dtype_ = 0;
  AtenTensorHandle handle_ = nullptr;
};

}  // namespace funcnet

// Memory for what PyTorch's own operators allocate in a program.
//
// A convolution gives its result in new memory, which the kernel would map and clear at each call: a
// third of the time of a small network. While a `Recycling` lives, PyTorch's allocator for CPUs is
// one that offers the memory in which the result must end up, and keeps other large blocks for the
// next call, up to LIMIT. These are blocks of malloc, so that any thread may free them, then or later.

#pragma once

#include <c10/core/Allocator.h>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#if defined(__APPLE__)
#include <malloc/malloc.h>
#define FUNCNET_SIZE_OF malloc_size
#else
#include <malloc.h>
#define FUNCNET_SIZE_OF malloc_usable_size
#endif

// As in c10/core/CPUAllocator.h, which takes g++ half a second to read.
namespace c10 {
C10_API Allocator* GetCPUAllocator();
C10_API void SetCPUAllocator(Allocator* allocator, uint8_t priority);
}  // namespace c10

namespace funcnet {

// Memory of the program for one of the results, for a block of exactly this size.
struct Offer {
  void* data;
  size_t size;
  bool is_taken = false;
};

class Recycler final : public c10::Allocator {
 public:
  static constexpr size_t LARGE = 1 << 16, LIMIT = size_t(1) << 29;

  // One for the process, whichever program asks.
  static Recycler& get() {
    static Recycler* const one = new Recycler;
    return *one;
  }
  c10::DataPtr allocate(size_t size) override {
    void* const block = take(size);
    return {block, block, &give, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give; }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
  void enter() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (users_++ == 0) {
      usual_ = c10::GetCPUAllocator();
      c10::SetCPUAllocator(this, 0);
    }
  }
  void leave() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--users_ == 0) {
      c10::SetCPUAllocator(usual_, 0);
    }
  }
  // What is offered to the operator that this thread runs.
  static std::vector<Offer>& offers() {
    static thread_local std::vector<Offer> all;
    return all;
  }
  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& block : kept_) {
      std::free(block.second);
    }
    kept_.clear();
    total_ = 0;
  }

 private:
  void* take(size_t size) {
    if (size == 0) {
      return nullptr;
    }
    for (Offer& offer : offers()) {
      if (offer.size == size && !offer.is_taken) {
        offer.is_taken = true;
        return offer.data;
      }
    }
    if (size >= LARGE) {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = kept_.lower_bound(size);
      if (found != kept_.end() && found->first <= size + size / 4) {
        void* const block = found->second;
        total_ -= found->first;
        kept_.erase(found);
        return block;
      }
    }
    void* const block = std::aligned_alloc(64, (size + 63) / 64 * 64);
    if (block == nullptr) {
      throw std::bad_alloc();
    }
    return block;
  }
  static void give(void* block) {
    for (Offer& offer : offers()) {
      if (offer.data == block) {
        offer.is_taken = false;
        return;
      }
    }
    Recycler& all = get();
    const size_t size = block == nullptr ? 0 : FUNCNET_SIZE_OF(block);
    if (size >= LARGE) {
      const std::lock_guard<std::mutex> lock(all.mutex_);
      if (all.total_ + size <= LIMIT) {
        all.kept_.emplace(size, block);
        all.total_ += size;
        return;
      }
    }
    std::free(block);
  }

  std::mutex mutex_;
  std::multimap<size_t, void*> kept_;
  size_t total_ = 0;
  int users_ = 0;
  c10::Allocator* usual_ = nullptr;
};

static const bool recycler_is_cleared = (clear_more = [] { Recycler::get().clear(); }, true);

struct Recycling {
  explicit Recycling(std::vector<Offer> offers) {
    Recycler::offers() = std::move(offers);
    Recycler::get().enter();
  }
  ~Recycling() {
    Recycler::get().leave();
    Recycler::offers().clear();
  }
  Recycling(const Recycling&) = delete;
  Recycling& operator=(const Recycling&) = delete;
};

}  // namespace funcnet

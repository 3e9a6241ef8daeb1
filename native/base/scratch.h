// A buffer that its thread keeps between calls: for a few megabytes, getting fresh pages from the
// system takes as long as coding them.
#pragma once
#include <cstddef>
#include <memory>

namespace moebound {

template <class T>
class Scratch {
 public:
  // Room for n values, of any content. Valid until this thread's next call with the same T and tag.
  T* room_for(size_t n) {
    if (n > size_) {
      buffer_ = std::make_unique_for_overwrite<T[]>(n);
      size_ = n;
    }
    return buffer_.get();
  }
  // Called when done: what is large goes back.
  void shrink() {
    if (size_ * sizeof(T) > kKeptBytes) {
      buffer_.reset();
      size_ = 0;
    }
  }

 private:
  static constexpr size_t kKeptBytes = size_t(16) << 20;
  std::unique_ptr<T[]> buffer_;
  size_t size_ = 0;
};

}  // namespace moebound

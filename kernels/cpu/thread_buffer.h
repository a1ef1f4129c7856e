// ThreadBuffer: memory that one thread's kernel calls use anew each time; it allocates only until it has seen the
// largest.
#ifndef SOLOIST_KERNELS_CPU_THREAD_BUFFER_H_
#define SOLOIST_KERNELS_CPU_THREAD_BUFFER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace soloist {

class ThreadBuffer {
 public:
  // Room for `count` values, aligned to 64 bytes, with anything in it. The last call's is no longer valid.
  template <typename T>
  T* Get(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    if (bytes > bytes_) {
      data_.reset();
      data_.reset(static_cast<std::byte*>(::operator new(bytes, kAlign)));
      bytes_ = bytes;
    }
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, kAlign); }
  };
  std::unique_ptr<std::byte, Free> data_;
  int64_t bytes_ = 0;
};

}  // namespace soloist

#endif  // SOLOIST_KERNELS_CPU_THREAD_BUFFER_H_

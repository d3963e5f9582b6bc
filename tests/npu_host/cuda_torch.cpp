// Loaded before torch_npu where torch is a CUDA build.
//
// torch's CUDA allocator and torch_npu 2.14 register allocator settings of the same names, and the second
// registration throws while torch_npu's library is being loaded: the process aborts. torch_npu belongs to
// torch's CPU build (PyPI's wheel for x86 is the CUDA build); taking CUDA's names back gives what that build has.

#include <dlfcn.h>

#include <string>
#include <unordered_set>

#include <c10/core/AllocatorConfig.h>

namespace {

using Keys = std::unordered_set<std::string>;

constexpr const char* kCudaKeys = "_ZZN3c104cuda20CUDACachingAllocator19CUDAAllocatorConfig7getKeysB5cxx11EvE4keys";

__attribute__((constructor)) void forget() {
  void* cuda = dlopen("libc10_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  const auto* keys = cuda ? static_cast<const Keys*>(dlsym(cuda, kCudaKeys)) : nullptr;
  if (keys == nullptr) return;
  for (const std::string& key : *keys) c10::CachingAllocator::AcceleratorAllocatorConfig::getMutableKeys().erase(key);
}

}  // namespace

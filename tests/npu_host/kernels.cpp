// Kernels of the device "npu" on the host's memory.
//
// One boxed kernel serves every operator: it gives the operator's CPU kernel CPU tensors over the same
// memory, so views, in-place and out= arguments are exact. Results that are new move into memory of
// torch_npu's allocator with the strides that the CPU kernel chose. An operator without a CPU kernel
// raises and says its name. `npu::` operators are looked up in the namespace `npu_host`.
//
// While a stream is captured, every call is recorded with raw pointers, as a device graph keeps them.
// The memory is put back when the capture ends: a capture runs nothing.

#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/Resize.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "driver.h"

namespace {

using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

// --- a CPU tensor over the memory of a device tensor -----------------------------------------------------

struct Pair {
  at::Tensor device, host;
  void* memory;  // where the storage lay when the call began
};

struct Aliases {
  std::vector<Pair> pairs;
  std::map<c10::StorageImpl*, c10::Storage> storages;  // device storage -> host storage over the same bytes
  bool needs_grad = false;                             // tell the kernel which inputs require gradients

  at::Tensor host(const at::Tensor& device) {
    for (const Pair& known : pairs)
      if (known.device.unsafeGetTensorImpl() == device.unsafeGetTensorImpl()) return known.host;
    TORCH_CHECK(!device.is_conj() && !device.is_neg(), "npu_host: conjugated or negated views are not supported");
    c10::StorageImpl* storage = device.storage().unsafeGetStorageImpl();
    auto found = storages.find(storage);
    if (found == storages.end()) {
      // Resizable on purpose: an out= argument that grows moves to new memory, which finish() notices.
      c10::Storage over(c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), storage->nbytes(),
          c10::DataPtr(storage->mutable_data(), c10::Device(c10::kCPU)), c10::GetDefaultCPUAllocator(), true));
      found = storages.emplace(storage, over).first;
    }
    at::Tensor made = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(found->second), c10::DispatchKeySet(c10::DispatchKey::CPU), device.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(device.sizes(), device.strides(), device.storage_offset());
    if (needs_grad && device.requires_grad()) made.unsafeGetTensorImpl()->set_requires_grad(true);
    pairs.push_back({device, made, storage->mutable_data()});
    return made;
  }
};

bool on_device(const at::Tensor& t) { return t.defined() && t.device().type() == c10::kPrivateUse1; }

size_t span(const at::Tensor& t) {
  return at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.dtype().itemsize());
}

// --- recordings ------------------------------------------------------------------------------------------

struct Step {
  OperatorHandle called, op;         // as the program names it; what runs
  Stack inputs;                      // CPU tensors over raw pointers; they own nothing
  std::vector<at::Tensor> results;   // where new results go, in order; undefined for what an argument holds
  int64_t read, written;
};

struct Recording {
  std::vector<Step> steps;
  std::vector<std::pair<void*, std::vector<char>>> before;  // what lay where the capture wrote, in order
  std::set<std::pair<void*, size_t>> kept;
  std::string problem;

  // Results may lie where an input of the capture lay: torch frees its inputs while it captures.
  void keep(void* memory, size_t bytes) {
    if (memory == nullptr || bytes == 0 || !kept.insert({memory, bytes}).second) return;
    const char* from = static_cast<const char*>(memory);
    before.emplace_back(memory, std::vector<char>(from, from + bytes));
  }
};

Recording* recording = nullptr;

void flatten(const IValue& value, std::vector<at::Tensor>& into) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) into.push_back(value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor& t : value.toTensorVector()) into.push_back(t);
  } else if (value.isList()) {
    for (const IValue& v : value.toListRef()) flatten(v, into);
  }
}

std::vector<at::Tensor> flatten(const Stack& stack) {
  std::vector<at::Tensor> found;
  for (const IValue& value : stack) flatten(value, found);
  return found;
}

// --- counting ----------------------------------------------------------------------------------------------

struct Count {
  int64_t launches = 0, read = 0, written = 0;
};
std::map<std::string, Count> counts;
std::mutex counting;

void count(const OperatorHandle& op, int64_t read, int64_t written) {
  std::lock_guard<std::mutex> lock(counting);
  const auto& name = op.operator_name();
  Count& entry = counts[name.overload_name.empty() ? name.name : name.name + "." + name.overload_name];
  entry.launches += 1;
  entry.read += read;
  entry.written += written;
}

// --- the kernel ----------------------------------------------------------------------------------------------

std::unordered_map<std::string, OperatorHandle> stand_ins;  // npu::x or aten::x -> npu_host::x

const std::set<std::string> kMixesDevices = {
    "aten::copy_", "aten::_copy_from", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::index_put",
    "aten::_index_put_impl_", "aten::_foreach_copy_", "aten::_copy_from_and_resize", "aten::set_"};
const std::set<std::string> kReadsOnHost = {
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::equal",
    "aten::is_nonzero", "aten::_unique2", "aten::unique_consecutive", "aten::repeat_interleave.Tensor",
    "aten::repeat_interleave.self_Tensor"};

at::Tensor to_host(Aliases& aliases, const OperatorHandle& op, const at::Tensor& t) {
  if (!t.defined() || on_device(t)) return t.defined() ? aliases.host(t) : t;
  TORCH_CHECK(t.dim() == 0 || kMixesDevices.count(op.operator_name().name),
              "npu_host: ", op.operator_name(), ": Expected all tensors to be on the same device, but found ",
              t.device(), " beside npu");
  return t;
}

IValue to_host(Aliases& aliases, const OperatorHandle& op, const IValue& value) {
  if (value.isTensor()) return to_host(aliases, op, value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> made;
    for (const at::Tensor& t : value.toTensorVector()) made.push_back(to_host(aliases, op, t));
    return made;
  }
  if (value.isList() && value.toList().elementType()->kind() == c10::TypeKind::OptionalType) {
    c10::List<std::optional<at::Tensor>> made;
    for (const IValue& v : value.toListRef())
      made.push_back(v.isNone() ? std::nullopt : std::optional<at::Tensor>(to_host(aliases, op, v.toTensor())));
    return made;
  }
  if (value.isDevice() && value.toDevice().type() == c10::kPrivateUse1) return c10::Device(c10::kCPU);
  if (value.isGenerator() && value.toGenerator().device().type() == c10::kPrivateUse1) return IValue();
  return value;
}

struct Call {
  const OperatorHandle& op;
  Aliases aliases;
  c10::Device wanted{c10::kPrivateUse1};
  std::vector<at::Tensor> results;  // for the recording
  int64_t written = 0;

  explicit Call(const OperatorHandle& given) : op(given) {}

  // The device tensor for one result of the CPU kernel.
  at::Tensor finish(const at::Tensor& made) {
    if (!made.defined()) return made;
    for (const Pair& pair : aliases.pairs)
      if (pair.host.unsafeGetTensorImpl() == made.unsafeGetTensorImpl()) {
        results.emplace_back();
        return pair.device;
      }
    c10::StorageImpl* storage = made.storage().unsafeGetStorageImpl();
    for (const Pair& pair : aliases.pairs)
      if (pair.host.storage().unsafeGetStorageImpl() == storage) {
        results.emplace_back();
        if (wanted.type() == c10::kCPU) return made.clone();
        return pair.device.as_strided(made.sizes(), made.strides(), made.storage_offset());
      }
    if (wanted.type() == c10::kCPU) {
      TORCH_CHECK(recording == nullptr, "npu_host: ", op.operator_name(), " copies to the host during a capture");
      return made;
    }
    at::Tensor device = at::empty_strided(made.sizes(), made.strides(), made.options().device(wanted));
    const size_t bytes = span(made);
    if (bytes) std::memcpy(device.storage().mutable_data(), made.const_data_ptr(), bytes);
    written += bytes;
    if (recording != nullptr) {
      Aliases own;
      results.push_back(own.host(device));
    }
    return device;
  }

  IValue finish(const IValue& made) {
    if (made.isTensor()) return finish(made.toTensor());
    if (made.isTensorList()) {
      c10::List<at::Tensor> all;
      for (const at::Tensor& t : made.toTensorVector()) all.push_back(finish(t));
      return all;
    }
    return made;
  }

  // An argument that the kernel resized: out= of another shape.
  void follow(const Pair& pair) {
    const at::Tensor& host = pair.host;
    const bool moved = host.storage().mutable_data() != pair.memory;
    if (!moved && host.sizes() == pair.device.sizes() && host.strides() == pair.device.strides()) return;
    TORCH_CHECK(recording == nullptr, "npu_host: ", op.operator_name(), " resizes an argument during a capture");
    pair.device.resize_(host.sizes());
    pair.device.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), pair.device.storage_offset());
    const size_t offset = host.storage_offset() * host.dtype().itemsize();
    if (moved && span(host))
      std::memcpy(static_cast<char*>(pair.device.storage().mutable_data()) + offset, host.const_data_ptr(), span(host));
  }
};

void protect_arguments(const c10::FunctionSchema& schema, const Stack& arguments) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::AliasInfo* info = schema.arguments()[i].alias_info();
    if (info == nullptr || !info->isWrite()) continue;
    std::vector<at::Tensor> written;
    flatten(arguments[i], written);
    for (const at::Tensor& t : written) recording->keep(t.storage().mutable_data(), t.storage().nbytes());
  }
}

// A capture runs nothing, so indices may be memory that nobody has written yet: then any index does.
void call_for_shapes(const OperatorHandle& op, Stack& stack) {
  const Stack arguments = stack;
  try {
    op.callBoxed(&stack);
  } catch (const c10::Error&) {
    stack = arguments;
    for (size_t i = 0; i < stack.size(); ++i) {
      const c10::AliasInfo* info = op.schema().arguments()[i].alias_info();
      if (info != nullptr || !stack[i].isTensor()) continue;
      const at::Tensor given = stack[i].toTensor();
      if (given.defined() && at::isIntegralType(given.scalar_type(), false)) stack[i] = at::zeros_like(given);
    }
    op.callBoxed(&stack);
  }
}

void run(const OperatorHandle& called, Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView below;
  const auto stand_in = stand_ins.find(toString(called.operator_name()));
  const OperatorHandle& op = stand_in == stand_ins.end() ? called : stand_in->second;
  const c10::FunctionSchema& schema = called.schema();
  const size_t inputs = schema.arguments().size();
  TORCH_CHECK(!npu_host_capturing() || !(kReadsOnHost.count(called.operator_name().name) ||
                                        kReadsOnHost.count(toString(called.operator_name()))),
              "npu_host: ", called.operator_name(), " reads device memory on the host during a capture");

  Call call(called);
  call.aliases.needs_grad = stand_in != stand_ins.end();
  Stack arguments;
  int64_t read = 0;
  bool chosen = false;
  for (size_t i = 0; i < inputs; ++i) {
    const IValue& value = (*stack)[stack->size() - inputs + i];
    if (value.isDevice() && schema.arguments()[i].name() == "device") {
      call.wanted = value.toDevice();
      chosen = true;
    }
    arguments.push_back(to_host(call.aliases, called, value));
  }
  for (const Pair& pair : call.aliases.pairs) {
    if (!chosen) call.wanted = pair.device.device(), chosen = true;
    read += pair.device.numel() * pair.device.itemsize();
  }

  if (recording != nullptr) protect_arguments(schema, arguments);
  Stack results = arguments;
  if (recording == nullptr) {
    op.callBoxed(&results);
  } else {
    call_for_shapes(op, results);
  }
  for (const Pair& pair : call.aliases.pairs) call.follow(pair);
  torch::jit::drop(*stack, inputs);
  for (const IValue& value : results) stack->push_back(call.finish(value));
  for (size_t i = 0; i < inputs; ++i) {
    const c10::AliasInfo* info = schema.arguments()[i].alias_info();
    if (info == nullptr || !info->isWrite()) continue;
    std::vector<at::Tensor> changed;
    flatten(arguments[i], changed);
    for (const at::Tensor& t : changed) call.written += t.numel() * t.itemsize();
  }
  if (call.written > 0 && recording == nullptr) count(called, read, call.written);
  if (recording != nullptr && !(call.wanted.type() == c10::kCPU))
    recording->steps.push_back({called, op, std::move(arguments), std::move(call.results), read, call.written});
}

// torch_npu's own allocation, then NaN in what a program must not read: memory comes back from its cache.
std::unordered_map<std::string, c10::SafeKernelFunction> allocators;

void allocate(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  allocators.at(toString(op.operator_name())).callBoxed(op, keys, stack);
  const at::Tensor& made = stack->back().toTensor();
  if (recording != nullptr) recording->keep(made.storage().mutable_data(), span(made));
  if ((made.is_floating_point() || made.is_complex()) && span(made))
    std::memset(made.storage().mutable_data(), 0xFF, span(made));
}

void refuse(const OperatorHandle& op, Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "npu_host: the stand-in has no kernel for ", op.operator_name());
}

// --- hooks of the driver -----------------------------------------------------------------------------------

void* begin_recording() { return recording = new Recording(); }

void end_recording(void* handle) {
  auto* done = static_cast<Recording*>(handle);
  recording = nullptr;
  for (auto kept = done->before.rbegin(); kept != done->before.rend(); ++kept)
    std::memcpy(kept->first, kept->second.data(), kept->second.size());
  done->before.clear();
  done->kept.clear();
}

const char* replay_recording(void* handle) {
  auto* kept = static_cast<Recording*>(handle);
  at::AutoDispatchBelowADInplaceOrView below;
  try {
    for (Step& step : kept->steps) {
      Stack stack = step.inputs;
      step.op.callBoxed(&stack);
      size_t next = 0;
      for (const at::Tensor& made : flatten(stack)) {
        if (next >= step.results.size()) break;
        const at::Tensor& to = step.results[next++];
        if (!to.defined()) continue;
        TORCH_CHECK(to.sizes() == made.sizes() && to.strides() == made.strides(), "the result of ",
                    step.op.operator_name(), " has changed its shape since the capture");
        if (span(made)) std::memcpy(to.mutable_data_ptr(), made.const_data_ptr(), span(made));
      }
      count(step.called, step.read, step.written);
    }
  } catch (const std::exception& fault) {
    kept->problem = std::string("npu_host: replay: ") + fault.what();
    return kept->problem.c_str();
  }
  return nullptr;
}

void drop_recording(void* handle) { delete static_cast<Recording*>(handle); }

// --- which operators ---------------------------------------------------------------------------------------

// Allocation, metadata and views stay torch_npu's own: they touch no element.
const std::set<std::string> kTorchNpusOwn = {
    "aten::empty.memory_format", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided",
    "aten::resize_", "aten::resize_as_", "aten::set_.source_Storage", "aten::set_.source_Storage_storage_offset",
    "aten::set_.source_Tensor", "aten::set_", "aten::set_data", "aten::record_stream", "aten::is_pinned",
    "aten::pin_memory", "aten::_pin_memory", "aten::is_set_to", "aten::_has_compatible_shallow_copy_type",
    "npu::npu_format_cast", "npu::npu_format_cast_", "npu::get_npu_format", "npu::get_storage_size",
    "npu::_npu_format_cast", "npu::npu_change_data_ptr", "npu::_npu_storage_resize", "npu::empty_with_format",
    "npu::unsafe_empty_with_format", "npu::get_npu_storage_desc"};

bool is_view(const c10::FunctionSchema& schema) {
  for (const auto& result : schema.returns())
    if (result.alias_info() != nullptr && !result.alias_info()->isWrite()) return true;
  return false;
}

class Quiet : public c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

std::vector<std::string> refused;

void install() {
  auto& dispatcher = c10::Dispatcher::singleton();
  static torch::Library aten(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  static torch::Library npu(torch::Library::IMPL, "npu", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  Quiet quiet;
  c10::WarningUtils::WarningHandlerGuard guard(&quiet);
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    const bool is_npu = name.getNamespace() == "npu";
    if (!is_npu && name.getNamespace() != "aten") continue;
    const auto op = dispatcher.findSchema(name);
    const std::string text = toString(name);
    const std::string bare = text.substr(text.find("::") + 2);
    torch::Library& library = is_npu ? npu : aten;
    if (op.has_value() && (text == "aten::empty.memory_format" || text == "aten::empty_strided")) {
      allocators.emplace(text, op->getComputedKernelForDispatchKey(c10::DispatchKey::PrivateUse1));
      library.impl(bare.c_str(), torch::CppFunction::makeFromBoxedFunction<&allocate>());
      continue;
    }
    if (!op.has_value() || kTorchNpusOwn.count(text)) continue;
    const bool here = op->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1);
    if (is_npu) {
      const auto stand_in = dispatcher.findSchema({"npu_host::" + name.name.substr(5), name.overload_name});
      if (stand_in.has_value()) stand_ins.emplace(text, *stand_in);
      if (!stand_in.has_value() && !here) continue;
      if (!stand_in.has_value()) refused.push_back(text);
      library.impl(bare.c_str(), stand_in.has_value() ? torch::CppFunction::makeFromBoxedFunction<&run>()
                                                      : torch::CppFunction::makeFromBoxedFunction<&refuse>());
      continue;
    }
    const bool cpu = op->hasKernelForDispatchKey(c10::DispatchKey::CPU);
    if (!here && !cpu) continue;
    if (is_view(op->schema()) && here) continue;
    const auto stand_in = dispatcher.findSchema({"npu_host::" + name.name.substr(6), name.overload_name});
    if (stand_in.has_value()) stand_ins.emplace(text, *stand_in);
    const bool runs = stand_in.has_value() || op->hasComputedKernelForDispatchKey(c10::DispatchKey::CPU);
    if (!runs) refused.push_back(text);
    library.impl(bare.c_str(), runs ? torch::CppFunction::makeFromBoxedFunction<&run>()
                                    : torch::CppFunction::makeFromBoxedFunction<&refuse>());
  }
  static const npu_host_capture_hooks hooks = {begin_recording, end_recording, replay_recording, drop_recording};
  npu_host_set_capture_hooks(&hooks);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(npu_host, m) {
  m.def("_install() -> str[]", []() {
    install();
    return refused;
  });
  m.def("_counts() -> (str[], int[])", []() {
    std::lock_guard<std::mutex> lock(counting);
    std::vector<std::string> names;
    std::vector<int64_t> numbers;
    for (const auto& [name, entry] : counts) {
      names.push_back(name);
      numbers.insert(numbers.end(), {entry.launches, entry.read, entry.written});
    }
    return std::make_tuple(names, numbers);
  });
  m.def("_reset_counts() -> ()", []() {
    std::lock_guard<std::mutex> lock(counting);
    counts.clear();
  });
}

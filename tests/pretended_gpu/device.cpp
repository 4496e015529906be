// A CUDA device that is none: its memory is the computer's, its kernels are torch's for the CPU.
//
// Loaded before torch, it takes the places that torch's own CUDA library would take: guard, hooks, generators,
// allocator, and a kernel for every operation. That kernel computes on tensors of the CPU that share the
// memory of those on the device, and refuses what a GPU refuses: operands on different devices. What a GPU
// does by itself, later and in streams of its own, is kept book of in order.h.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>

#include "order.h"

#define API extern "C" __attribute__((visibility("default")))

namespace pretended {
namespace {

using c10::DataPtr;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::IValue;
using c10::Storage;
using c10::Stream;

const Device kDevice(DeviceType::CUDA, 0);
const Device kHost(DeviceType::CPU);

Stream stream_of(int number) { return Stream(Stream::UNSAFE, kDevice, number); }
int number_of(const Stream& stream) { return static_cast<int>(stream.id()); }

// ---- bytes of tensors on the device, and the most there were ----

std::atomic<long> live_bytes{0}, peak_bytes{0};

void count(long bytes) {
  long now = live_bytes += bytes;
  for (long peak = peak_bytes; now > peak && !peak_bytes.compare_exchange_weak(peak, now);) {
  }
}

// ---- waits ----

enum class OnWait { kNothing, kWarn, kRaise };  // torch.cuda.set_sync_debug_mode
std::atomic<OnWait> on_wait{OnWait::kNothing};

void program_waits(const std::string& why) {
  order().program_waits_for_stream(Order::current);
  TORCH_CHECK(on_wait != OnWait::kRaise, "called a synchronizing CUDA operation: ", why);
  if (on_wait == OnWait::kWarn) TORCH_WARN("called a synchronizing CUDA operation: ", why);
}

// ---- what torch asks a kind of device for ----

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return kDevice; }
  Device getDevice() const override { return kDevice; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Stream getStream(Device) const override { return stream_of(Order::current); }
  Stream getDefaultStream(Device) const override { return stream_of(0); }
  Stream getNewStream(Device, int) const override { return stream_of(order().new_stream()); }
  Stream exchangeStream(Stream stream) const override {
    return stream_of(std::exchange(Order::current, number_of(stream)));
  }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream& stream) const override { order().program_waits_for_stream(number_of(stream)); }
  void synchronizeDevice(const DeviceIndex) const override { order().program_waits_for_all(); }
  void record(void** event, const Stream& stream, const DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(order().record(number_of(stream)));
  }
  void block(void* event, const Stream& stream) const override {
    if (event) order().wait(number_of(stream), reinterpret_cast<long>(event));
  }
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void* event) const override { order().program_waits_for_event(reinterpret_cast<long>(event)); }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const DataPtr& data, const Stream& stream) const override {
    order().told_allocator(data.get(), number_of(stream));
  }
};

void* host_memory(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes ? bytes : 64)) throw std::bad_alloc();
  return memory;
}

// Page-locked memory: the computer's, and known by its address.
struct PageLocked final : c10::Allocator {
  static inline std::mutex& mutex = *new std::mutex;
  static inline std::set<void*>& known = *new std::set<void*>;

  static bool has(const void* address) {
    std::lock_guard guard(mutex);
    return known.count(const_cast<void*>(address));
  }
  static void release(void* memory) {
    {
      std::lock_guard guard(mutex);
      known.erase(memory);
    }
    free(memory);
  }
  DataPtr allocate(size_t bytes) override {
    void* memory = host_memory(bytes);
    std::lock_guard guard(mutex);
    known.insert(memory);
    return DataPtr(memory, memory, &release, kHost);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, size_t bytes) const override { memcpy(target, source, bytes); }
};

// What torch resizes storages of the device with.
struct DeviceAllocator final : c10::Allocator {
  DataPtr allocate(size_t bytes) override {
    void* memory = host_memory(bytes);
    return DataPtr(memory, memory, &free, kDevice);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* target, const void* source, size_t bytes) const override { memcpy(target, source, bytes); }
};

PageLocked& page_locked = *new PageLocked;
DeviceAllocator& device_allocator = *new DeviceAllocator;
[[maybe_unused]] const int allocator_is_set = (c10::SetAllocator(DeviceType::CUDA, &device_allocator), 0);

// A generator of the device is one of the CPU that says otherwise.
struct Generator final : at::CPUGeneratorImpl {
  Generator() { device_ = kDevice; }
  void claim(Device device) { device_ = device; }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  void deviceSynchronize(DeviceIndex) const override { order().program_waits_for_all(); }
  bool isPinnedPtr(const void* address) const override { return PageLocked::has(address); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &page_locked; }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::make_generator<Generator>(); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    static at::Generator& only = *new at::Generator(at::make_generator<Generator>());
    return only;
  }
};

// ---- tensors of the device as tensors of the CPU, and back ----

struct Held {  // memory of the device, which a storage of the CPU owns
  Storage storage;
  long bytes;
};

void release_held(void* context) {
  auto* held = static_cast<Held*>(context);
  live_bytes -= held->bytes;
  order().freed(held->storage.mutable_data());
  delete held;
}

DataPtr on_device(const Storage& storage, const std::string& operation) {
  auto* held = new Held{storage, static_cast<long>(storage.nbytes())};
  count(held->bytes);
  void* address = storage.mutable_data();
  if (address) order().allocated(address, operation);
  return DataPtr(address, held, &release_held, kDevice);
}

at::Tensor same_view(const at::Tensor& tensor, const Storage& storage) {
  auto key = storage.device().is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  auto result = at::detail::make_tensor<c10::TensorImpl>(Storage(storage), c10::DispatchKeySet(key), tensor.dtype());
  result.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  if (tensor.is_conj()) result._set_conj(true);
  if (tensor.is_neg()) result._set_neg(true);
  return result;
}

// One operation: its tensors on the CPU, and what came of them on the device.
class Call {
 public:
  explicit Call(std::string name) : name_(std::move(name)) {}

  at::Tensor down(const at::Tensor& tensor, bool written) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    Storage storage = tensor.storage();
    void* address = storage.mutable_data();
    (written ? writes_ : reads_).push_back(address);
    auto& host = hosts_[storage.unsafeGetStorageImpl()];
    if (!host) {
      DataPtr shared(address, address, [](void*) {}, kHost);
      auto size = Storage::use_byte_size_t();
      host = Storage(size, storage.nbytes(), std::move(shared), c10::GetAllocator(DeviceType::CPU), true);
      if (address) devices_.emplace(address, storage);
    }
    pairs_.emplace_back(tensor, same_view(tensor, host));
    return pairs_.back().second;
  }

  at::Tensor up(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.is_cuda()) return tensor;
    for (auto& [device, host] : pairs_)
      if (host.is_same(tensor)) return device;
    Storage storage = tensor.storage();
    void* address = storage.mutable_data();
    if (auto it = devices_.find(address); address && it != devices_.end()) return same_view(tensor, it->second);
    Storage result(Storage::use_byte_size_t(), storage.nbytes(), on_device(storage, name_), &device_allocator, true);
    if (address) devices_.emplace(address, result);
    return same_view(tensor, result);
  }

  // The operation may have resized what it wrote to, or given it other memory.
  void follow() {
    for (auto& [device, host] : pairs_) {
      auto* impl = device.unsafeGetTensorImpl();
      Storage storage = host.storage();
      if (storage.mutable_data() != impl->storage().mutable_data()) {
        auto* target = impl->storage().unsafeGetStorageImpl();
        target->set_data_ptr_noswap(on_device(storage, name_));
        target->set_nbytes(storage.nbytes());
      }
      impl->set_storage_offset(host.storage_offset());
      impl->set_sizes_and_strides(host.sizes(), host.strides());
    }
  }

  Use queued() const { return order().operation(name_, reads_, writes_); }
  bool on_device_at_all() const { return !pairs_.empty(); }

 private:
  std::string name_;
  std::unordered_map<c10::StorageImpl*, Storage> hosts_;
  std::unordered_map<void*, Storage> devices_;
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs_;  // of the device, of the CPU
  std::vector<void*> reads_, writes_;
};

std::string fault() {
  const auto found = order().take_fault();
  return found.empty() ? found : "not in order on a GPU: " + found;
}

void raise_faults() {
  if (const auto found = fault(); !found.empty()) TORCH_CHECK(false, found);
}

// ---- the kernel of every operation ----

const std::set<std::string> kTakesBoth = {  // operands on the CPU beside those on the device
    "aten::_fused_adamw_", "aten::_index_put_impl_", "aten::index", "aten::index_put", "aten::index_put_", "aten::set_",
};
const std::set<std::string> kOnlyViews = {  // which no kernel runs for
    "aten::_reshape_alias", "aten::alias", "aten::as_strided", "aten::detach", "aten::set_", "aten::unfold",
    "aten::view", "aten::view_as_complex", "aten::view_as_real",
};
const std::set<std::string> kReadByProgram = {
    "aten::_local_scalar_dense", "aten::_unique2", "aten::equal", "aten::masked_select", "aten::nonzero",
};

class Arguments {  // of an operation, on their way to the CPU
 public:
  Arguments(const c10::FunctionSchema& schema, torch::jit::Stack& stack) : call(schema.name()) {
    const size_t first = stack.size() - schema.arguments().size();
    for (size_t i = 0; i < schema.arguments().size(); i++) {
      const auto* alias = schema.arguments()[i].alias_info();
      convert(stack[first + i], alias && alias->isWrite());
    }
    TORCH_CHECK(!(on_host_ && call.on_device_at_all()) || kTakesBoth.count(schema.name()),
                schema.name(), ": all tensors must be on one device, and some are on the CPU beside those on the GPU");
  }

  ~Arguments() {
    for (auto* generator : generators_) generator->claim(kDevice);
  }

  Call call;

 private:
  void convert(IValue& value, bool written) {
    if (value.isTensor()) {
      value = down(value.toTensor(), written);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(down(tensor, written));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (std::optional<at::Tensor> tensor : value.toOptionalTensorList())
        list.push_back(tensor ? std::optional(down(*tensor, written)) : std::nullopt);
      value = list;
    } else if (value.isGenerator() && value.toGenerator().device().is_cuda()) {
      generators_.push_back(static_cast<Generator*>(value.toGenerator().unsafeGetGeneratorImpl()));
      generators_.back()->claim(kHost);
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      value = kHost;
    }
  }

  at::Tensor down(const at::Tensor& tensor, bool written) {
    on_host_ |= tensor.defined() && tensor.is_cpu() && tensor.dim() > 0;  // a number is passed by value
    return call.down(tensor, written);
  }

  bool on_host_ = false;
  std::vector<Generator*> generators_;
};

// Softmax from half precision to single is one operation for GPUs only. Returns where the result of its backward
// has to be copied to.
template <class Argument>
at::Tensor widen_softmax(const std::string& name, const Argument& argument) {
  if ((name == "aten::_softmax" || name == "aten::_log_softmax") && argument(2).toBool()) {
    argument(0) = argument(0).toTensor().to(at::kFloat);
    argument(2) = false;
  } else if (name == "aten::_softmax_backward_data" || name == "aten::_log_softmax_backward_data") {
    const auto given = argument(0).toTensor().scalar_type();
    const at::Tensor target = argument(4).toTensor();
    if (target.scalar_type() != given) {
      argument(3) = given;
      argument(4) = at::empty_like(target, given);
      return target;
    }
  }
  return {};
}

void kernel(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const auto& schema = operation.schema();
  const std::string& name = schema.name();
  Arguments arguments(schema, *stack);
  auto argument = [&](size_t i) -> IValue& { return (*stack)[stack->size() - schema.arguments().size() + i]; };
  if (!kOnlyViews.count(name)) arguments.call.queued();
  if (kReadByProgram.count(name)) program_waits(name);
  const at::Tensor narrowed = widen_softmax(name, argument);
  raise_faults();
  operation.callBoxed(stack);
  if (narrowed.defined()) stack->back() = narrowed.copy_(stack->back().toTensor());
  arguments.call.follow();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) {
    IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = arguments.call.up(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(arguments.call.up(tensor));
      value = list;
    }
  }
}

bool is_page_locked(const at::Tensor& tensor) { return PageLocked::has(tensor.storage().data()); }

at::Tensor& copy(at::Tensor& target, const at::Tensor& source, bool non_blocking) {
  Call call("aten::copy_");
  at::Tensor to = call.down(target, true), from = call.down(source, false);
  const Use use = call.queued();
  const bool outward = source.is_cpu(), homeward = target.is_cpu();
  if (outward) order().reads_host(source, use);
  if (homeward && non_blocking && is_page_locked(target)) {
    at::Tensor value = at::empty_like(target);
    value.copy_(from);
    order().sent_back(target.detach(), value, use);
  } else {
    to.copy_(from);
    if (outward && non_blocking && is_page_locked(source)) {
      if (source.is_contiguous()) order().sent(source.detach(), use);
    } else if (homeward || (outward && !non_blocking)) {
      program_waits(homeward ? "a copy from the device" : "a copy to the device");
    }
  }
  raise_faults();
  return target;
}

void record_stream(at::Tensor& tensor, Stream stream) {
  order().told_allocator(tensor.storage().mutable_data(), number_of(stream));
}

bool is_pinned(const at::Tensor&, std::optional<Device>) { return false; }

}  // namespace
}  // namespace pretended

// ---- the places that torch's CUDA library would take ----

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, pretended::Guard);
}

namespace at {
using CUDAHooks = pretended::Hooks;  // found by this name
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at

namespace at::accelerator {  // torch's for the CPU say that there is none
__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) {
  return c10::DeviceType::CUDA;
}
__attribute__((visibility("default"))) bool isAccelerator(c10::DeviceType kind) {
  return kind == c10::DeviceType::CUDA;
}
}  // namespace at::accelerator

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&pretended::kernel>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("copy_", &pretended::copy);
  library.impl("is_pinned", &pretended::is_pinned);
  library.impl("record_stream", &pretended::record_stream);
}

// ---- for cuda_module.py ----

API int pretended_new_stream() { return pretended::order().new_stream(); }
API int pretended_stream() { return pretended::Order::current; }
API void pretended_use_stream(int stream) { pretended::Order::current = stream; }
API void pretended_finish_stream(int stream) { pretended::order().program_waits_for_stream(stream); }
API void pretended_finish_all() { pretended::order().program_waits_for_all(); }
API long pretended_record(int stream) { return pretended::order().record(stream); }
API void pretended_wait(int stream, long event) { pretended::order().wait(stream, event); }
API void pretended_finish_event(long event) { pretended::order().program_waits_for_event(event); }
API long pretended_live_bytes() { return pretended::live_bytes; }
API long pretended_peak_bytes() { return pretended::peak_bytes; }
API void pretended_forget_peak() { pretended::peak_bytes = pretended::live_bytes.load(); }
API void pretended_set_on_wait(int mode) { pretended::on_wait = static_cast<pretended::OnWait>(mode); }
API int pretended_get_on_wait() { return static_cast<int>(pretended::on_wait.load()); }
API void pretended_tell_allocator(void* address, int stream) { pretended::order().told_allocator(address, stream); }
API void pretended_resize(void* storage, size_t bytes) {
  auto* impl = static_cast<c10::StorageImpl*>(storage);
  auto memory = pretended::device_allocator.allocate(bytes);
  std::memcpy(memory.get(), impl->data(), std::min(bytes, impl->nbytes()));
  impl->set_data_ptr_noswap(std::move(memory));
  impl->set_nbytes(bytes);
}
API const char* pretended_used(const char* operation, void* address, bool written) {
  thread_local std::string fault;
  std::vector<void*> one{address}, none;
  pretended::order().operation(operation, written ? none : one, written ? one : none);
  fault = pretended::fault();
  return fault.c_str();
}

// In which order a GPU does what it was asked for: streams, events, and who uses which memory when.
//
// Work of one stream is done in the order in which it was asked for; between streams, and between them and the
// program, only waits make an order. Each stream has a clock for every stream (a vector clock): up to which of
// the other's operations it has waited. Two uses of the same memory of which one writes must be in order; if
// they are not, a real GPU may mix them, and nothing here would show it: so a `Fault` is kept, and the next
// operation raises it.
//
// Copies between the device and page-locked memory that nobody waits for are made as late as a GPU might make
// them: until the program has waited, a target in the computer's memory holds rubbish, and a source must not
// change.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace pretended {

constexpr int kStreams = 256;
using Clock = std::array<long, kStreams>;  // of every stream: how many of its operations are known to be done

struct Use {
  int stream = -1;  // none
  long number = 0;
  std::string operation;

  bool done_for(const Clock& clock) const { return stream < 0 || clock[stream] >= number; }
};

struct Memory {
  int owner;  // the stream for which it was allocated, and for which it is used again
  Use written;
  std::map<int, Use> read;       // the last one of each stream
  std::set<int> told_allocator;  // streams of record_stream
};

struct Copy {  // between the device and page-locked memory, which may not have been made yet
  at::Tensor on_host, value;
  Use use;
};

class Order {
 public:
  thread_local static inline int current = 0;

  int new_stream() {
    auto guard = lock();
    TORCH_CHECK(streams_ < kStreams, "more streams than the pretended GPU has");
    return streams_++;
  }

  long record(int stream) {
    auto guard = lock();
    join(clocks_[stream], program_);
    events_[++last_event_] = clocks_[stream];
    return last_event_;
  }

  void wait(int stream, long event) {
    auto guard = lock();
    join(clocks_[stream], events_.at(event));
  }

  void program_waits_for_event(long event) {
    auto guard = lock();
    program_waits(events_.at(event));
  }

  void program_waits_for_stream(int stream) {
    auto guard = lock();
    program_waits(clocks_[stream]);
  }

  void program_waits_for_all() {
    auto guard = lock();
    for (int stream = 0; stream < streams_; stream++) program_waits(clocks_[stream]);
  }

  // An operation of the current stream, which reads and writes memory (by address).
  Use operation(const std::string& name, const std::vector<void*>& reads, const std::vector<void*>& writes) {
    auto guard = lock();
    join(clocks_[current], program_);
    Use use{current, ++clocks_[current][current], name};
    for (void* address : reads)
      if (auto it = memory_.find(address); it != memory_.end()) note_read(it->second, use);
    for (void* address : writes)
      if (auto it = memory_.find(address); it != memory_.end()) note_written(it->second, use);
    return use;
  }

  void allocated(void* address, const std::string& operation) {
    auto guard = lock();
    Use use{current, clocks_[current][current], operation};
    memory_[address] = Memory{current, use, {}, {}};
  }

  void told_allocator(void* address, int stream) {
    auto guard = lock();
    if (auto it = memory_.find(address); it != memory_.end()) it->second.told_allocator.insert(stream);
  }

  void freed(void* address) {
    auto guard = lock();
    auto it = memory_.find(address);
    if (it == memory_.end()) return;
    const Memory& memory = it->second;
    auto check = [&](const Use& use) {
      if (use.stream == memory.owner || memory.told_allocator.count(use.stream)) return;
      if (!use.done_for(clocks_[memory.owner]) && !use.done_for(program_))
        fault("memory of stream " + std::to_string(memory.owner) + " is free for it while " + told(use) +
              " may still use it; record_stream was not called");
    };
    check(memory.written);
    for (auto& [stream, use] : memory.read) check(use);
    memory_.erase(it);
  }

  // A copy from page-locked memory to the device, made by `use`: the source may not change for a while.
  void sent(const at::Tensor& source, const Use& use) {
    auto guard = lock();
    outward_.push_back({source, source.clone(), use});
  }

  // A copy from the device to page-locked memory, made by `use`: the target is rubbish for a while.
  void sent_back(const at::Tensor& target, const at::Tensor& value, const Use& use) {
    auto guard = lock();
    for (auto it = outward_.begin(); it != outward_.end();) {
      if (it->on_host.storage().data() != target.storage().data()) { ++it; continue; }
      if (!it->use.done_for(clocks_[use.stream])) fault(told(use) + " overwrites the source of " + told(it->use));
      it = outward_.erase(it);
    }
    target.view(at::kByte).fill_(0xFF);  // NaN, as a floating-point number
    homeward_.push_back({target, value, use});
  }

  // A copy to the device, made by `use`, whose source may still be on its way back from it.
  void reads_host(const at::Tensor& source, const Use& use) {
    auto guard = lock();
    for (auto it = homeward_.begin(); it != homeward_.end();) {
      if (it->on_host.storage().data() != source.storage().data()) { ++it; continue; }
      if (!it->use.done_for(clocks_[use.stream])) fault(told(use) + " reads what " + told(it->use) + " brings back");
      it->on_host.copy_(it->value);
      it = homeward_.erase(it);
    }
  }

  std::string take_fault() {
    auto guard = lock();
    return std::exchange(fault_, "");
  }

 private:
  std::unique_lock<std::recursive_mutex> lock() { return std::unique_lock(mutex_); }

  static void join(Clock& clock, const Clock& other) {
    for (int stream = 0; stream < kStreams; stream++) clock[stream] = std::max(clock[stream], other[stream]);
  }

  static std::string told(const Use& use) { return use.operation + " on stream " + std::to_string(use.stream); }

  void fault(const std::string& what) {
    if (fault_.empty()) fault_ = what;
  }

  void note_read(Memory& memory, const Use& use) {
    if (!memory.written.done_for(clocks_[use.stream])) fault(told(use) + " reads what " + told(memory.written) + " writes");
    memory.read[use.stream] = use;
  }

  void note_written(Memory& memory, const Use& use) {
    for (auto& [stream, read] : memory.read)
      if (!read.done_for(clocks_[use.stream])) fault(told(use) + " overwrites what " + told(read) + " reads");
    if (!memory.written.done_for(clocks_[use.stream])) fault(told(use) + " overwrites what " + told(memory.written) + " writes");
    memory.read.clear();
    memory.written = use;
  }

  void program_waits(const Clock& clock) {
    join(program_, clock);
    std::erase_if(homeward_, [&](Copy& copy) {
      if (!copy.use.done_for(program_)) return false;
      copy.on_host.copy_(copy.value);
      return true;
    });
    std::erase_if(outward_, [&](Copy& copy) {
      if (!copy.use.done_for(program_)) return false;
      if (!at::equal(copy.on_host.view(at::kByte), copy.value.view(at::kByte)))
        fault("the source of " + told(copy.use) + " changed before the program had waited for the copy");
      return true;
    });
  }

  std::recursive_mutex mutex_;
  std::array<Clock, kStreams> clocks_{};
  Clock program_{};
  int streams_ = 1;
  long last_event_ = 0;
  std::map<long, Clock> events_;
  std::unordered_map<void*, Memory> memory_;
  std::vector<Copy> outward_, homeward_;
  std::string fault_;
};

// Never destroyed: tensors may outlive static variables.
inline Order& order() {
  static Order& only = *new Order;
  return only;
}

}  // namespace pretended

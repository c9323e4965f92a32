// Memory of the device, which the host cannot read, and page-locked memory of the host, which the device can.
//
// The device's addresses are mapped without any access; kernels use a second mapping of the same pages. Blocks are kept
// as CUDA's caching allocator does: what is freed is at once its own stream's again (where it was recorded on others,
// once those have come by), and another stream's only after all that is cached was given up. Contents are NaN from the
// moment at which somebody else may have written them.
#pragma once

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <set>
#include <vector>

#include "streams.h"

namespace sim {

constexpr size_t kSpan = size_t{1} << 37;  // addresses, not memory
constexpr size_t kAlign = 512;             // as on a GPU
constexpr int kNobody = -1;
constexpr int kPoison = 0xFF;              // NaN in every floating-point format

struct Block {
  size_t size = 0;
  size_t requested = 0;
  int stream = kNobody;
  bool is_live = false;
  std::set<int> used_on;          // streams that it was recorded on
  std::vector<MarkPtr> awaited;   // of those, once it was freed
  bool is_free() const { return !is_live && awaited.empty(); }
};

class Memory {
 public:
  static Memory& get() {
    static auto* held = new Memory;
    return *held;
  }

  size_t limit = size_t{8} << 30;
  size_t allocated = 0, allocated_peak = 0, reserved = 0, reserved_peak = 0;
  size_t requested = 0, requested_peak = 0;  // without what is rounded up

  bool holds(const void* address) const {
    const auto* held = static_cast<const char*>(address);
    return base_ <= held && held < base_ + kSpan;
  }

  // Where kernels find what the host has by this address. Memory of the host is where it is.
  void* reached(const void* address) const {
    auto* held = const_cast<char*>(static_cast<const char*>(address));
    return holds(address) ? held - base_ + alias_ : held;
  }

  void* allocate(size_t wanted, int stream) {
    if (wanted == 0) return nullptr;
    const Lock lock;
    const size_t size = (wanted + kAlign - 1) / kAlign * kAlign;
    settle();
    auto found = best(size, stream);
    if (!found && reserved + size > limit) {
      Streams::get().flush();
      settle();
      release();
      found = best(size, stream);
    }
    if (!found) found = best(size, kNobody);
    if ((*found)->second.stream == kNobody && reserved + size > limit) {
      TORCH_CHECK_WITH(
          OutOfMemoryError, false, "the simulated device is out of memory: ", wanted, " bytes were asked for, of ",
          limit, " bytes ", allocated, " are allocated");
    }
    auto block = split(*found, size);
    if (block->second.stream == kNobody) reserved += size;
    block->second.stream = stream;
    block->second.is_live = true;
    block->second.requested = wanted;
    allocated += size;
    requested += wanted;
    requested_peak = std::max(requested_peak, requested);
    allocated_peak = std::max(allocated_peak, allocated);
    reserved_peak = std::max(reserved_peak, reserved);
    poison(block, stream);
    return block->first;
  }

  void free(void* address) {
    if (address == nullptr) return;
    const Lock lock;
    auto block = blocks_.find(static_cast<char*>(address));
    auto& held = block->second;
    held.is_live = false;
    allocated -= held.size;
    requested -= held.requested;
    for (const int stream : held.used_on) held.awaited.push_back(Streams::get().record(stream));
    held.used_on.clear();
    if (held.awaited.empty()) {  // its own stream may have it at once
      poison(block, held.stream);
      merge_at(block);
    } else {
      ++unsettled_;
    }
    settle();
  }

  void record(const void* address, int stream) {
    if (address == nullptr || !holds(address)) return;
    const Lock lock;
    auto block = std::prev(blocks_.upper_bound(const_cast<char*>(static_cast<const char*>(address))));
    if (block->second.is_live && block->second.stream != stream) block->second.used_on.insert(stream);
  }

  // Give up what is cached: it may be any stream's then.
  void empty_cache() {
    const Lock lock;
    Streams::get().flush();
    settle();
    release();
  }

 private:
  char* base_ = nullptr;
  char* alias_ = nullptr;
  int file_ = -1;
  size_t unsettled_ = 0;  // blocks that were freed and wait for streams
  using Blocks = std::map<char*, Block>;
  Blocks blocks_;

  Memory() {
    file_ = memfd_create("memplan-sim", MFD_CLOEXEC);
    TORCH_CHECK(file_ >= 0 && ftruncate(file_, kSpan) == 0, "no memory for the simulated device");
    void* base = mmap(nullptr, kSpan, PROT_NONE, MAP_SHARED | MAP_NORESERVE, file_, 0);
    void* alias = mmap(nullptr, kSpan, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file_, 0);
    TORCH_CHECK(base != MAP_FAILED && alias != MAP_FAILED, "no addresses for the simulated device");
    madvise(alias, kSpan, MADV_DONTDUMP);
    base_ = static_cast<char*>(base);
    alias_ = static_cast<char*>(alias);
    blocks_[base_].size = kSpan;
  }

  std::optional<Blocks::iterator> best(size_t size, int stream) {
    std::optional<Blocks::iterator> found;
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      const auto& held = block->second;
      if (!held.is_free() || held.stream != stream || held.size < size) continue;
      if (!found || held.size < (*found)->second.size) found = block;
    }
    return found;
  }

  Blocks::iterator split(Blocks::iterator block, size_t size) {
    if (block->second.size > size) {
      Block rest = block->second;
      rest.size -= size;
      blocks_[block->first + size] = rest;
      block->second.size = size;
    }
    return block;
  }

  void poison(Blocks::iterator block, int stream) {
    void* where = reached(block->first);
    const size_t size = block->second.size;
    Streams::get().enqueue(stream, [where, size] { std::memset(where, kPoison, size); });
  }

  // Have what was freed be free, where the streams that it was recorded on have come by.
  void settle() {
    for (auto& [address, block] : blocks_) {
      if (unsettled_ == 0) return;
      auto& awaited = block.awaited;
      if (awaited.empty()) continue;
      const auto is_done = [](const MarkPtr& mark) { return mark->done; };
      awaited.erase(std::remove_if(awaited.begin(), awaited.end(), is_done), awaited.end());
      if (awaited.empty()) --unsettled_;
    }
  }

  // Join a block with those beside it that are as free.
  void merge_at(Blocks::iterator block) {
    const auto joins = [](const Block& one, const Block& other) {
      return one.is_free() && other.is_free() && one.stream == other.stream;
    };
    const auto next = std::next(block);
    if (next != blocks_.end() && joins(block->second, next->second)) {
      block->second.size += next->second.size;
      blocks_.erase(next);
    }
    if (block == blocks_.begin()) return;
    const auto before = std::prev(block);
    if (joins(before->second, block->second)) {
      before->second.size += block->second.size;
      blocks_.erase(block);
    }
  }

  void merge() {
    for (auto block = blocks_.begin(); block != blocks_.end();) {
      auto next = std::next(block);
      if (next == blocks_.end()) break;
      if (block->second.is_free() && next->second.is_free() && block->second.stream == next->second.stream) {
        block->second.size += next->second.size;
        blocks_.erase(next);
      } else {
        block = next;
      }
    }
  }

  void release() {
    for (auto& [address, block] : blocks_) {
      if (!block.is_free() || block.stream == kNobody) continue;
      block.stream = kNobody;
      reserved -= block.size;
      fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, address - base_, static_cast<off_t>(block.size));
    }
    merge();
  }
};

// Page-locked memory: torch's own, which is kept until copies of it have ended, and what somebody registered, which is
// theirs to keep.
class Pinned {
 public:
  static Pinned& get() {
    static auto* held = new Pinned;
    return *held;
  }

  struct Pages {
    size_t size = 0;
    bool is_registered = false;
    bool is_dropped = false;
    int64_t uses = 0;
  };

  void* allocate(size_t size) {
    if (size == 0) return nullptr;
    void* address = nullptr;
    TORCH_CHECK(posix_memalign(&address, kAlign, size) == 0, "no memory to page-lock");
    const Lock lock;
    pages_[static_cast<char*>(address)] = Pages{size, false, false, 0};
    return address;
  }

  void free(void* address) {
    if (address == nullptr) return;
    const Lock lock;
    auto found = pages_.find(static_cast<char*>(address));
    found->second.is_dropped = true;
    drop(found);
  }

  void add(void* address, size_t size) {
    const Lock lock;
    TORCH_CHECK(!is_pinned(address), "these pages are registered already");
    pages_[static_cast<char*>(address)] = Pages{size, true, false, 0};
  }

  void remove(void* address) {
    const Lock lock;
    auto found = pages_.find(static_cast<char*>(address));
    TORCH_CHECK(found != pages_.end() && found->second.is_registered, "these pages are not registered");
    const auto uses = found->second.uses;
    pages_.erase(found);
    TORCH_CHECK(uses == 0, "pages were unregistered under ", uses, " copies");
  }

  bool is_pinned(const void* address) {
    const Lock lock;
    return find(address) != pages_.end();
  }

  void begin_use(const void* address) {
    const Lock lock;
    auto found = find(address);
    if (found != pages_.end()) ++found->second.uses;
  }

  void end_use(const void* address) {
    const Lock lock;
    auto found = find(address);
    if (found == pages_.end()) return;
    --found->second.uses;
    drop(found);
  }

 private:
  std::map<char*, Pages> pages_;

  std::map<char*, Pages>::iterator find(const void* address) {
    auto* held = const_cast<char*>(static_cast<const char*>(address));
    auto found = pages_.upper_bound(held);
    if (found == pages_.begin()) return pages_.end();
    --found;
    return held < found->first + found->second.size ? found : pages_.end();
  }

  void drop(std::map<char*, Pages>::iterator found) {
    if (!found->second.is_dropped || found->second.uses > 0) return;
    char* address = found->first;
    pages_.erase(found);
    std::free(address);
  }
};

}  // namespace sim

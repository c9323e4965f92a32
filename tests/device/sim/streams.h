// Streams, events and the policy that says whose work runs next.
//
// Nothing runs when it is enqueued unless the policy favours its stream: a stream is a queue, and who waits (a
// synchronisation, a copy that blocks, a value that is read) runs what it waits for, in the order that streams and
// events allow. There is no thread here, so the same program takes the same order every time.
#pragma once

#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <array>
#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

namespace sim {

constexpr int kCompute = 0;  // the default stream; all others are taken for copy streams

// Which streams run as soon as their events allow. The others run only what somebody waits for, one piece of work at a
// time.
enum Policy { kCopiesFirst = 0, kComputeFirst = 1, kLazy = 2 };

enum Wait { kStream, kEvent, kDevice, kCopy, kValue, kWaits };

// One record of an event: done once its stream has come to it.
struct Mark {
  int stream;
  bool done = false;
  double at_ms = 0;
};
using MarkPtr = std::shared_ptr<Mark>;

struct Work {
  std::function<void()> run;  // of a kernel or a copy
  MarkPtr records;            // else: what is done now,
  MarkPtr waits;              // or what must be done before
};

struct Queue {
  std::deque<Work> waiting;
  uint64_t enqueued = 0;
  uint64_t finished = 0;
};

// A lock that lets Python go on while it waits: a kernel that is written in Python needs the interpreter.
class Lock {
 public:
  Lock() {
    if (mutex().try_lock()) return;
    using Check = int (*)();
    using Save = void* (*)();
    using Restore = void (*)(void*);
    static const auto check = reinterpret_cast<Check>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));
    static const auto save = reinterpret_cast<Save>(dlsym(RTLD_DEFAULT, "PyEval_SaveThread"));
    static const auto restore = reinterpret_cast<Restore>(dlsym(RTLD_DEFAULT, "PyEval_RestoreThread"));
    if (check == nullptr || save == nullptr || restore == nullptr || check() == 0) {
      mutex().lock();
      return;
    }
    void* thread = save();
    mutex().lock();
    restore(thread);
  }
  ~Lock() { mutex().unlock(); }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

 private:
  static std::recursive_mutex& mutex() {
    static auto* held = new std::recursive_mutex;  // never destroyed: storages are freed as the process ends
    return *held;
  }
};

inline double now_ms() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(now).count();
}

class Streams {
 public:
  static Streams& get() {
    static auto* held = new Streams;
    return *held;
  }

  Policy policy = kCopiesFirst;
  bool enabled = false;
  std::array<int64_t, kWaits> waits{};  // how often the host waited, by what for

  int create() {
    const Lock lock;
    queues_.emplace_back();
    return static_cast<int>(queues_.size()) - 1;
  }

  void enqueue(int stream, std::function<void()> run) { push(stream, {std::move(run), nullptr, nullptr}); }

  MarkPtr record(int stream) {
    auto mark = std::make_shared<Mark>();
    mark->stream = stream;
    push(stream, {nullptr, mark, nullptr});
    return mark;
  }

  void wait(int stream, const MarkPtr& mark) { push(stream, {nullptr, nullptr, mark}); }

  bool is_idle(int stream) {
    const Lock lock;
    return queue(stream).waiting.empty();
  }

  // The host waits: for a stream, an event, all.
  void synchronize(int stream, Wait kind) {
    const Lock lock;
    ++waits.at(kind);
    finish(stream);
    raise();
  }

  void synchronize(const MarkPtr& mark) {
    const Lock lock;
    ++waits.at(kEvent);
    while (!mark->done) {
      favour();
      if (!mark->done) step(mark->stream);
    }
    raise();
  }

  void synchronize() {
    const Lock lock;
    ++waits.at(kDevice);
    flush();
    raise();
  }

  // As a driver does by itself when memory is short: counted by nobody.
  void flush() {
    const Lock lock;
    for (size_t stream = 0; stream < queues_.size(); ++stream) finish(static_cast<int>(stream));
  }

  int64_t pending() {
    const Lock lock;
    int64_t total = 0;
    for (const auto& queue : queues_) total += static_cast<int64_t>(queue.waiting.size());
    return total;
  }

 private:
  std::deque<Queue> queues_{1};
  std::string error_;
  bool running_ = false;

  Queue& queue(int stream) { return queues_.at(static_cast<size_t>(stream)); }

  void push(int stream, Work work) {
    const Lock lock;
    auto& held = queue(stream);
    held.waiting.push_back(std::move(work));
    ++held.enqueued;
    favour();
  }

  bool is_favoured(size_t stream) const {
    if (policy == kLazy) return false;
    return (stream == kCompute) == (policy == kComputeFirst);
  }

  bool is_ready(size_t stream) const {
    const auto& waiting = queues_[stream].waiting;
    return !waiting.empty() && (!waiting.front().waits || waiting.front().waits->done);
  }

  void favour() {
    if (running_) return;
    for (bool moved = true; moved;) {
      moved = false;
      for (size_t stream = 0; stream < queues_.size(); ++stream) {
        while (is_favoured(stream) && is_ready(stream)) {
          run_first(stream);
          moved = true;
        }
      }
    }
  }

  void finish(int stream) {
    auto& held = queue(stream);
    const uint64_t until = held.enqueued;
    while (held.finished < until) {
      favour();
      if (held.finished < until) step(stream);
    }
    favour();
  }

  // Run one piece of work: the stream's next, or of the stream that this one waits for.
  void step(int stream) {
    while (!is_ready(static_cast<size_t>(stream))) stream = queue(stream).waiting.front().waits->stream;
    run_first(static_cast<size_t>(stream));
  }

  void run_first(size_t stream) {
    auto& held = queues_[stream];
    Work work = std::move(held.waiting.front());
    held.waiting.pop_front();
    if (work.run) {
      TORCH_CHECK(!running_, "work on the simulated device must not wait for the device");
      running_ = true;
      try {
        work.run();
      } catch (const std::exception& error) {  // as on a device: who waits next is told
        if (error_.empty()) error_ = error.what();
      }
      running_ = false;
    }
    if (work.records) {
      work.records->at_ms = now_ms();
      work.records->done = true;
    }
    ++held.finished;
  }

  void raise() {
    if (error_.empty()) return;
    const std::string error = std::exchange(error_, "");
    TORCH_CHECK(false, "work on the simulated device failed: ", error);
  }
};

inline thread_local int current_stream = kCompute;

}  // namespace sim

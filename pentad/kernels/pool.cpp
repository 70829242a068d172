#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pentad {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

// A phase is many chunks. Who waits for the last one by STALL longer than all of the phase has taken so far waits for a
// thread that the system has taken off its core, for another process. If much of a step is lost so, that process is
// there to stay: one thread fewer is used for a while (a retreat), and longer each time that all together stall at once.
// Who has waited for long sleeps, which frees its core for the other thread; but to be woken may take a millisecond.
constexpr auto STALL = microseconds(200);
constexpr auto SPIN_STALLED = microseconds(2000);
constexpr auto SPIN_BETWEEN_STEPS = microseconds(200);
constexpr Clock::duration LONGEST_RETREAT = milliseconds(500);

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// Spins until `ready()`, for at most `limit`; whether it was ready.
template <class Ready>
bool spin(Clock::duration limit, Ready ready) {
  const auto start = Clock::now();
  for (;;) {
    for (int i = 0; i < 64; i++) {
      if (ready()) return true;
      pause();
    }
    if (Clock::now() - start > limit) return false;
  }
}

// Chunks are claimed by one atomic: which phase is open (a number that never returns), how many chunks it has and which
// comes next. So whoever claims knows without another look whether there was a chunk left, and a thread that comes late
// can't take a chunk of a job that is over.
class Claims {
 public:
  struct Claim {
    uint32_t epoch;
    int count, chunk;  // of so many this one; -1: none was left
  };

  void open(int count) {
    const uint64_t epoch = (value_.load(std::memory_order_relaxed) >> 40) + 1;
    value_.store(epoch << 40 | uint64_t(count) << 20, std::memory_order_seq_cst);
  }
  Claim take() {
    const uint64_t v = value_.fetch_add(1, std::memory_order_acq_rel);
    const int count = int(v >> 20 & 0xfffff), next = int(v & 0xfffff);
    return {uint32_t(v >> 40), count, next < count ? next : -1};
  }
  uint32_t epoch() const { return uint32_t(value_.load(std::memory_order_seq_cst) >> 40); }

 private:
  std::atomic<uint64_t> value_{0};
};

class Pool {
 public:
  void run(const Job& job, int threads) {
    std::lock_guard<std::mutex> one_at_a_time(running_);
    job_ = &job;
    phase_ = -1;
    const int helpers = grow(threads - 1);
    const auto start = Clock::now();
    started_at_.store(start.time_since_epoch().count(), std::memory_order_relaxed);
    const int active = start < retreat_end_ ? std::min(helpers, retreat_to_) : helpers;
    active_.store(active, std::memory_order_relaxed);
    lost_.store(0, std::memory_order_relaxed);
    if (advance()) {
      if (active > 0) call_helpers();
      take_part(-1);
    }
    const auto end = Clock::now();
    const Clock::duration lost(lost_.load(std::memory_order_relaxed));
    if (lost > (end - start) / 3) {
      const bool at_once = start - retreat_end_ < retreat_;
      retreat_ = std::min(at_once ? retreat_ * 2 : lost * 4, LONGEST_RETREAT);
      retreat_end_ = end + retreat_;
      retreat_to_ = std::max(0, active - 1);
    }
  }

 private:
  // Does chunks until the job is done, or until helper `index` (-1: the caller) is no longer wanted.
  void take_part(int index) {
    for (;;) {
      const auto claim = claims_.take();
      if (claim.chunk >= 0) {
        job_->work(job_->context, phase_, claim.chunk);
        if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == claim.count) advance();
        continue;
      }
      auto changed = [&] { return claims_.epoch() != claim.epoch; };
      // A finished job is a last phase of no chunks. The caller leaves when it sees that, not before: who has finished
      // the job may be about to open it, and would open it over the next job's first.
      if (claim.count == 0 || (index >= 0 && index >= active_.load(std::memory_order_relaxed))) return;
      const Clock::duration opened(opened_at_.load(std::memory_order_relaxed));
      if (spin(STALL + (Clock::now().time_since_epoch() - opened), changed)) continue;
      wait_out_a_stall(changed);
    }
  }

  template <class Changed> void wait_out_a_stall(Changed changed) {
    const auto start = Clock::now();
    if (!spin(SPIN_STALLED, changed)) {
      std::unique_lock<std::mutex> lock(sleep_);
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      woken_.wait(lock, changed);
      sleepers_.fetch_sub(1, std::memory_order_relaxed);
    }
    const auto end = Clock::now();
    const Clock::duration lost(lost_.fetch_add((end - start + STALL).count(), std::memory_order_relaxed));
    const Clock::duration started(started_at_.load(std::memory_order_relaxed));
    if (lost > milliseconds(5) + (end.time_since_epoch() - started) / 4)  // a long step doesn't wait for its end to retreat
      active_.store(std::max(0, active_.load(std::memory_order_relaxed) - 1), std::memory_order_relaxed);
  }

  // Opens the next phase. Only who has finished the last chunk of the one before comes here; what is one chunk is done
  // at once, without the others.
  // Whether there was one.
  bool advance() {
    for (;;) {
      phase_++;
      if (phase_ == job_->phases) {
        publish(0);
        return false;
      }
      const int count = job_->chunks(job_->context, phase_);
      if (count == 1) job_->work(job_->context, phase_, 0);
      if (count <= 1) continue;
      publish(count);
      return true;
    }
  }

  void publish(int count) {
    done_.store(0, std::memory_order_relaxed);
    opened_at_.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
    claims_.open(count);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      woken_.notify_all();
    }
  }

  void call_helpers() {
    calls_.fetch_add(1, std::memory_order_seq_cst);
    if (parked_count_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(parking_);
      unparked_.notify_all();
    }
  }

  void help(int index) {
    uint32_t seen = 0;
    for (;;) {
      auto called = [&] { return calls_.load(std::memory_order_seq_cst) != seen; };
      if (!spin(SPIN_BETWEEN_STEPS, called)) {
        std::unique_lock<std::mutex> lock(parking_);
        parked_count_.fetch_add(1, std::memory_order_seq_cst);
        unparked_.wait(lock, called);
        parked_count_.fetch_sub(1, std::memory_order_relaxed);
      }
      seen = calls_.load(std::memory_order_seq_cst);
      if (index < active_.load(std::memory_order_relaxed)) take_part(index);
    }
  }

  // Makes helpers where there are fewer than wanted; how many there are to be used. The system may refuse.
  int grow(int wanted) {
    try {
      for (; helpers_ < wanted; helpers_++) std::thread(&Pool::help, this, helpers_).detach();
    } catch (const std::system_error&) {
    }
    return std::max(0, std::min(helpers_, wanted));
  }

  alignas(128) Claims claims_;
  alignas(128) std::atomic<int> done_{0};
  alignas(128) const Job* job_ = nullptr;  // this and the next change only between phases
  int phase_ = 0;
  std::atomic<Clock::rep> started_at_{0}, opened_at_{0};
  std::atomic<Clock::rep> lost_{0};
  std::atomic<int> active_{0};
  std::atomic<int> sleepers_{0}, parked_count_{0};
  std::atomic<uint32_t> calls_{0};
  std::mutex running_, sleep_, parking_;
  std::condition_variable woken_, unparked_;
  int helpers_ = 0, retreat_to_ = 0;
  Clock::duration retreat_ = Clock::duration::zero();
  Clock::time_point retreat_end_{};
};

// A forked child has none of the threads, and may find the locks held by one: it begins with a pool of its own. Pools
// are never destroyed, as their threads may run until the process ends.
std::atomic<Pool*> pool{nullptr};
std::once_flag fork_handler;

Pool& the_pool() {
  std::call_once(fork_handler, [] { pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); }); });
  Pool* p = pool.load();
  if (p == nullptr) {
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(p, fresh)) return *fresh;
    delete fresh;  // another thread was faster
  }
  return *p;
}

}  // namespace

void run_on_pool(const Job& job, int threads) { the_pool().run(job, threads); }

}  // namespace pentad

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

// If a thread waits STALL longer than the whole phase has taken so far, the thread it waits for has probably been
// descheduled in favor of another process. If a large part of a step is lost in stalls, that process is likely to go on,
// so the pool uses one thread fewer for a while (a retreat). If stalls return right after a retreat, the next retreat is
// twice as long. A thread that has stalled for SPIN_STALLED sleeps, which frees its core for the missing thread; it doesn't
// sleep earlier, because waking it may take a millisecond.
constexpr auto STALL = microseconds(200);
constexpr auto SPIN_STALLED = microseconds(2000);
constexpr auto SPIN_BETWEEN_STEPS = microseconds(200);
constexpr Clock::duration MAX_RETREAT = milliseconds(500);

constexpr int MAX_THREADS = 64;
constexpr uint32_t DONE = 1;

// The number of 64-byte cache lines of its next weights that a thread prefetches while it waits for the next phase, and
// before it opens that phase itself. The hardware prefetchers start only after some misses.
constexpr int LINES_WHILE_WAITING = 256, LINES_BEFORE_OPENING = 48;

inline void fetch(const Prefetch& prefetch, int first, int end) {
  for (const uint8_t* address : prefetch.addresses)
    for (int line = first; address && line < end; line++) __builtin_prefetch(address + line * 64, 0, 2);
}

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// Spins until `ready()`, for at most `limit`. Returns false on timeout.
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

// A thread's share of a phase: neighboring chunks, in order, so that the thread reads memory in order too. A thread whose
// queue is empty steals from the others. This one cache line holds all that a thread needs about a phase, because
// fetching a line from another core takes about as long as a small phase.
struct alignas(128) WorkQueue {
  std::atomic<uint64_t> chunks{0};    // upper half: end, lower half: next chunk; a late thread can't pop from a past phase
  std::atomic<uint32_t> state{DONE};  // changes with each phase; the lowest bit is set when the job is done
  int phase = 0;                      // safe to read while holding a chunk: the chunk's phase can't end
  std::atomic<Clock::rep> opened_at{0};

  int pop() {  // -1: empty
    const uint64_t seen = chunks.load(std::memory_order_relaxed);
    if (uint32_t(seen) >= seen >> 32) return -1;  // a waiting thread should not write to the line
    const uint64_t v = chunks.fetch_add(1, std::memory_order_acq_rel);
    return uint32_t(v) < v >> 32 ? int(uint32_t(v)) : -1;
  }
};

class Pool {
 public:
  void run(const Job& job, int threads) {
    std::lock_guard<std::mutex> one_job_at_a_time(running_);
    const int workers = start_workers(threads - 1);
    const auto start = Clock::now();
    started_at_.store(start.time_since_epoch().count(), std::memory_order_relaxed);
    const int active = start < retreat_end_ ? std::min(workers, retreat_to_) : workers;
    active_.store(active, std::memory_order_relaxed);
    lost_.store(0, std::memory_order_relaxed);
    job_ = &job;
    threads_.store(active + 1, std::memory_order_relaxed);
    phase_ = -1;
    if (advance()) {
      if (active > 0) wake_workers();
      process(0);
    }
    const auto end = Clock::now();
    const Clock::duration lost(lost_.load(std::memory_order_relaxed));
    if (lost > (end - start) / 3) {
      const bool soon_again = start - retreat_end_ < retreat_;
      retreat_ = std::min(soon_again ? retreat_ * 2 : lost * 4, MAX_RETREAT);
      retreat_end_ = end + retreat_;
      retreat_to_ = std::max(0, active - 1);
    }
  }

 private:
  // Runs chunks until the job is done, or until thread `me` (0: the caller) is no longer active.
  void process(int me) {
    WorkQueue& mine = queues_[me];
    for (;;) {
      const uint32_t state = mine.state.load(std::memory_order_acquire);
      Prefetch prefetch = {};
      if (const int done = run_chunks(me, prefetch)) {
        if (remaining_.fetch_sub(done, std::memory_order_acq_rel) == done) {
          fetch(prefetch, 0, LINES_BEFORE_OPENING);
          advance();
          continue;
        }
      }
      auto changed = [&] { return mine.state.load(std::memory_order_acquire) != state; };
      // The caller must not leave before DONE is set: the thread that finished the job may still be setting it.
      if (state & DONE || me > active_.load(std::memory_order_relaxed)) return;
      for (int line = 0; line < LINES_WHILE_WAITING && !changed(); line += 8) fetch(prefetch, line, line + 8);
      const Clock::duration opened(mine.opened_at.load(std::memory_order_relaxed));
      if (spin(STALL + (Clock::now().time_since_epoch() - opened), changed)) continue;
      wait_during_stall(changed);
    }
  }

  // Runs chunks of the open phase until none is left, and returns how many. The phase can't end before they are counted.
  int run_chunks(int me, Prefetch& prefetch) {
    const int threads = threads_.load(std::memory_order_relaxed);
    int done = 0, phase = 0;
    for (int i = 0; i < threads; i++) {
      WorkQueue& queue = queues_[(me + i) % threads];
      for (int chunk; (chunk = queue.pop()) >= 0; done++) job_->work(job_->context, phase = queue.phase, chunk);
    }
    if (done > 0 && job_->prefetch)
      prefetch = job_->prefetch(job_->context, phase, me, active_.load(std::memory_order_relaxed) + 1);
    return done;
  }

  template <class Changed> void wait_during_stall(Changed changed) {
    const auto start = Clock::now();
    if (!spin(SPIN_STALLED, changed)) {
      std::unique_lock<std::mutex> lock(sleep_);
      sleepers_.fetch_add(1, std::memory_order_acq_rel);
      woken_.wait(lock, changed);
      sleepers_.fetch_sub(1, std::memory_order_relaxed);
    }
    const auto end = Clock::now();
    const Clock::duration lost(lost_.fetch_add((end - start + STALL).count(), std::memory_order_relaxed));
    const Clock::duration started(started_at_.load(std::memory_order_relaxed));
    if (lost > milliseconds(5) + (end.time_since_epoch() - started) / 4)  // a long step retreats before its end
      active_.store(std::max(0, active_.load(std::memory_order_relaxed) - 1), std::memory_order_relaxed);
  }

  // Opens the next phase; returns false if there is none. Only the thread that finished the last chunk of the previous
  // phase gets here. It runs single-chunk phases itself, without waking the others.
  bool advance() {
    for (;;) {
      phase_++;
      if (phase_ == job_->phases) {
        open(0, DONE);
        return false;
      }
      const int count = job_->chunks(job_->context, phase_);
      if (count == 1) job_->work(job_->context, phase_, 0);
      if (count <= 1) continue;
      remaining_.store(count + 1, std::memory_order_relaxed);  // + 1: the phase can't end before all queues are open
      open(count, 0);
      if (remaining_.fetch_sub(1, std::memory_order_acq_rel) > 1) return true;
    }
  }

  // Publishes a phase, or the end of the job. After either, this thread must not touch the job.
  void open(int count, uint32_t done) {
    const int threads = threads_.load(std::memory_order_relaxed), shares = active_.load(std::memory_order_relaxed) + 1;
    const int phase = phase_;
    const auto now = Clock::now().time_since_epoch().count();
    for (int i = threads - 1; i >= 0; i--) {
      WorkQueue& queue = queues_[i];
      const int used = i < shares ? count : 0;  // an inactive thread gets no chunks, but must see the phase change
      const uint64_t first = first_chunk(used, i, shares), end = first_chunk(used, i + 1, shares);
      const uint32_t state = ((queue.state.load(std::memory_order_relaxed) | DONE) + 1) | done;
      if (!done) queue.phase = phase;
      queue.opened_at.store(now, std::memory_order_relaxed);
      queue.chunks.store(end << 32 | first, std::memory_order_release);
      queue.state.store(state, std::memory_order_release);
    }
    // A read-modify-write, not a load: a thread that goes to sleep either sees the new state or is counted here.
    if (sleepers_.fetch_add(0, std::memory_order_acq_rel) > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      woken_.notify_all();
    }
  }

  void wake_workers() {
    calls_.fetch_add(1, std::memory_order_seq_cst);
    if (parked_count_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(parking_);
      unparked_.notify_all();
    }
  }

  void run_worker(int me) {
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
      if (me <= active_.load(std::memory_order_relaxed)) process(me);
    }
  }

  // Starts missing workers, and returns how many can be used. The system may refuse to make more threads.
  int start_workers(int wanted) {
    try {
      for (; workers_ < std::min(wanted, MAX_THREADS - 1); workers_++)
        std::thread(&Pool::run_worker, this, workers_ + 1).detach();
    } catch (const std::system_error&) {
    }
    return std::max(0, std::min(workers_, wanted));
  }

  WorkQueue queues_[MAX_THREADS];
  alignas(128) std::atomic<int> remaining_{0};  // chunks of the phase
  int phase_ = 0;                               // used only by the thread that opens phases
  alignas(128) const Job* job_ = nullptr;
  std::atomic<int> threads_{0};  // of the job; each has a queue
  std::atomic<Clock::rep> started_at_{0};
  std::atomic<Clock::rep> lost_{0};
  std::atomic<int> active_{0};
  std::atomic<int> sleepers_{0}, parked_count_{0};
  std::atomic<uint32_t> calls_{0};
  std::mutex running_, sleep_, parking_;
  std::condition_variable woken_, unparked_;
  int workers_ = 0, retreat_to_ = 0;
  Clock::duration retreat_ = Clock::duration::zero();
  Clock::time_point retreat_end_{};
};

// A forked child inherits no threads, and the pool's locks may be held by threads that don't exist in the child. So the
// child starts with a new pool. Pools are never destroyed: their threads may run until the process ends.
std::atomic<Pool*> pool{nullptr};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });

Pool& the_pool() {
  Pool* p = pool.load();
  if (p == nullptr) {
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(p, fresh)) return *fresh;
    delete fresh;  // another thread has installed its pool first
  }
  return *p;
}

}  // namespace

void run_on_pool(const Job& job, int threads) { the_pool().run(job, threads); }

}  // namespace pentad

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

constexpr int MOST_THREADS = 64;
constexpr uint32_t OVER = 1;

// Lines of the cache, of 64 bytes, that a thread fetches of what it reads in the next phase: while it waits for that, and
// where it does itself what comes before. The caches' own prefetchers begin only after some misses.
constexpr int FETCHED_WAITING = 256, FETCHED_FIRST = 48;

inline void fetch(const Next& next, int from, int to) {
  for (const uint8_t* at : next.at)
    for (int line = from; at && line < to; line++) __builtin_prefetch(at + line * 64, 0, 2);
}

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

// A thread's share of a phase: neighboring chunks, which it takes in order, so that it reads memory in order too. Who has
// none left takes those of others. What a thread must know of a phase is in this one line of the cache, as each line that
// has to come from another core takes about as long as a small phase.
struct alignas(128) Share {
  std::atomic<uint64_t> chunks{0};    // their end, and which comes next: who is late can't take one of a past phase
  std::atomic<uint32_t> state{OVER};  // changes with each phase; whether the job is over
  int phase = 0;                      // may be read by who has a chunk, as the phase can't end before that is done
  std::atomic<Clock::rep> opened_at{0};

  int take() {  // -1: none was left
    const uint64_t seen = chunks.load(std::memory_order_relaxed);
    if (uint32_t(seen) >= seen >> 32) return -1;  // who waits should not write
    const uint64_t v = chunks.fetch_add(1, std::memory_order_acq_rel);
    return uint32_t(v) < v >> 32 ? int(uint32_t(v)) : -1;
  }
};

class Pool {
 public:
  void run(const Job& job, int threads) {
    std::lock_guard<std::mutex> one_at_a_time(running_);
    const int helpers = grow(threads - 1);
    const auto start = Clock::now();
    started_at_.store(start.time_since_epoch().count(), std::memory_order_relaxed);
    const int active = start < retreat_end_ ? std::min(helpers, retreat_to_) : helpers;
    active_.store(active, std::memory_order_relaxed);
    lost_.store(0, std::memory_order_relaxed);
    job_ = &job;
    threads_.store(active + 1, std::memory_order_relaxed);
    phase_ = -1;
    if (advance()) {
      if (active > 0) call_helpers();
      take_part(0);
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
  // Does chunks until the job is done, or until helper `me` (0: the caller) is no longer wanted.
  void take_part(int me) {
    Share& mine = shares_[me];
    for (;;) {
      const uint32_t state = mine.state.load(std::memory_order_acquire);
      Next next = {};
      if (const int done = do_chunks(me, next)) {
        if (left_.fetch_sub(done, std::memory_order_acq_rel) == done) {
          fetch(next, 0, FETCHED_FIRST);
          advance();
          continue;
        }
      }
      auto changed = [&] { return mine.state.load(std::memory_order_acquire) != state; };
      // The caller leaves when it sees that the job is over, not before: who has finished it may be about to say so.
      if (state & OVER || me > active_.load(std::memory_order_relaxed)) return;
      for (int line = 0; line < FETCHED_WAITING && !changed(); line += 8) fetch(next, line, line + 8);
      const Clock::duration opened(mine.opened_at.load(std::memory_order_relaxed));
      if (spin(STALL + (Clock::now().time_since_epoch() - opened), changed)) continue;
      wait_out_a_stall(changed);
    }
  }

  // How many chunks it has done of the open phase, until none was left. The phase can't end before they are counted.
  int do_chunks(int me, Next& next) {
    const int threads = threads_.load(std::memory_order_relaxed);
    int done = 0, phase = 0;
    for (int i = 0; i < threads; i++) {
      Share& share = shares_[(me + i) % threads];
      for (int chunk; (chunk = share.take()) >= 0; done++) job_->work(job_->context, phase = share.phase, chunk);
    }
    if (done > 0 && job_->next) next = job_->next(job_->context, phase, me, active_.load(std::memory_order_relaxed) + 1);
    return done;
  }

  template <class Changed> void wait_out_a_stall(Changed changed) {
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
    if (lost > milliseconds(5) + (end.time_since_epoch() - started) / 4)  // a long step doesn't wait for its end to retreat
      active_.store(std::max(0, active_.load(std::memory_order_relaxed) - 1), std::memory_order_relaxed);
  }

  // Opens the next phase; whether there was one. Only who has finished the last chunk of the one before comes here; what
  // is one chunk is done at once, without the others.
  bool advance() {
    for (;;) {
      phase_++;
      if (phase_ == job_->phases) {
        open(0, OVER);
        return false;
      }
      const int count = job_->chunks(job_->context, phase_);
      if (count == 1) job_->work(job_->context, phase_, 0);
      if (count <= 1) continue;
      left_.store(count + 1, std::memory_order_relaxed);  // one for who opens: until all shares are open, it can't end
      open(count, 0);
      if (left_.fetch_sub(1, std::memory_order_acq_rel) > 1) return true;
    }
  }

  // Tells all threads of a phase, or that the job is over: who says that touches nothing of it after.
  void open(int count, uint32_t over) {
    const int threads = threads_.load(std::memory_order_relaxed), shares = active_.load(std::memory_order_relaxed) + 1, phase = phase_;
    const auto now = Clock::now().time_since_epoch().count();
    for (int i = threads - 1; i >= 0; i--) {
      Share& share = shares_[i];
      const int used = i < shares ? count : 0;  // who is no longer wanted has none, but must see that the phase is another
      const uint64_t first = first_chunk(used, i, shares), end = first_chunk(used, i + 1, shares);
      const uint32_t state = ((share.state.load(std::memory_order_relaxed) | OVER) + 1) | over;
      if (!over) share.phase = phase;
      share.opened_at.store(now, std::memory_order_relaxed);
      share.chunks.store(end << 32 | first, std::memory_order_release);
      share.state.store(state, std::memory_order_release);
    }
    // Written, not only read: who goes to sleep either sees the new state or is seen here.
    if (sleepers_.fetch_add(0, std::memory_order_acq_rel) > 0) {
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

  void help(int me) {
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
      if (me <= active_.load(std::memory_order_relaxed)) take_part(me);
    }
  }

  // Makes helpers where there are fewer than wanted; how many there are to be used. The system may refuse.
  int grow(int wanted) {
    try {
      for (; helpers_ < std::min(wanted, MOST_THREADS - 1); helpers_++) std::thread(&Pool::help, this, helpers_ + 1).detach();
    } catch (const std::system_error&) {
    }
    return std::max(0, std::min(helpers_, wanted));
  }

  Share shares_[MOST_THREADS];
  alignas(128) std::atomic<int> left_{0};  // chunks of the phase
  int phase_ = 0;                          // for who opens it
  alignas(128) const Job* job_ = nullptr;
  std::atomic<int> threads_{0};  // of the job; each has a share of every phase
  std::atomic<Clock::rep> started_at_{0};
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

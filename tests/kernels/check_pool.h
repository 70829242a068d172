// The thread pool under stress: tiny steps, several callers, busy cores, forks.
#pragma once
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "check.h"

namespace {

// The pool reads the clock when it opens a phase. While this is set, reading the clock takes extra microseconds at random.
std::atomic<bool> clocks_lose_time{false};

// Tiny steps with known results: an operation has two to five chunks of a few numbers.
class TinySteps {
 public:
  explicit TinySteps(int isa) : random_(isa), table_(random_.numbers(WIDTH * 8)), plan_({isa}) {
    for (int i = 0; i < MAX_ROWS; i++) ids_.push_back(i % 8);
    plan_.step.ids = ids_.data();
    for (int out = 0; out < OPS; out++) {
      Matrix& m = plan_.add(EMBED, 0, 0, out, WIDTH).w[0];
      m.data = reinterpret_cast<const uint8_t*>(table_.data());
      m.type = F32, m.rows = 8, m.columns = WIDTH;
      plan_.buffers[out].resize(MAX_ROWS * WIDTH);
      plan_.step.buffers[out] = plan_.buffers[out].data();
    }
  }
  // Runs some steps in quick succession, and returns whether all results are right.
  bool run(int threads) {
    seconds_without_progress = 0;
    const int ops = 1 + random_.below(OPS), rows = 9 + random_.below(MAX_ROWS - 8);
    plan_.step.rows = rows, plan_.step.threads = threads;
    for (int out = 0; out < ops; out++) std::fill_n(plan_.buffers[out].begin(), rows * WIDTH, NAN);
    for (int first = 0, count; first < ops; first += count) {
      count = 1 + random_.below(ops - first);
      pentad_run(&plan_.ops[first], count, &plan_.step);
    }
    return right(ops, rows);
  }
  // Runs one step of many operations, long enough for the pool to retreat from stalled threads during the step.
  bool run_long(int threads) {
    plan_.step.rows = MAX_ROWS, plan_.step.threads = threads;
    const std::vector<Op> once = plan_.ops;
    std::vector<Op> many;
    for (int i = 0; i < 5000; i++) many.insert(many.end(), once.begin(), once.end());
    pentad_run(many.data(), int(many.size()), &plan_.step);
    return right(OPS, MAX_ROWS);
  }

 private:
  static constexpr int WIDTH = 2, MAX_ROWS = 40, OPS = 4;
  bool right(int ops, int rows) const {
    bool ok = true;
    for (int out = 0; out < ops; out++)
      for (int i = 0; i < rows * WIDTH; i++) ok &= plan_.buffers[out][i] == table_[i % table_.size()];
    return ok;
  }
  Random random_;
  Floats table_;
  Ints ids_;
  Plan plan_;
};

// Several callers at once, each with 1 to 5 threads, beside threads that keep the cores busy.
void stress(int isa, int callers, int busy, double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  std::atomic<bool> over{false}, ok{true};
  std::vector<std::thread> calling, idling;
  for (int i = 0; i < busy; i++)
    idling.emplace_back([&] {
      while (!over) {}
    });
  for (int i = 0; i < callers; i++)
    calling.emplace_back([&] {
      TinySteps tiny(isa);
      for (int n = 0; Clock::now() < end; n++) {
        const auto start = Clock::now();
        if (!(n % 20 == 10 ? tiny.run_long(n / 20 % 5 + 1) : tiny.run(n % 5 + 1))) ok = false;
        // After a stall the pool uses fewer threads for a while. Without this pause it would do so most of the time.
        const auto took = Clock::now() - start;
        if (took > std::chrono::microseconds(200)) std::this_thread::sleep_for(9 * took);
      }
    });
  for (auto& thread : calling) thread.join();
  over = true;
  for (auto& thread : idling) thread.join();
  expect(ok, "tiny steps of " + std::to_string(callers) + " callers beside " + std::to_string(busy) + " busy threads");
}

// A forked child starts threads of its own, even if it was forked while other threads ran steps.
void check_forks(int isa, int count) {
  std::atomic<bool> over{false}, ok{true};
  std::thread other([&] {
    for (TinySteps tiny(isa); !over;)
      if (!tiny.run(3)) ok = false;
  });
  TinySteps tiny(isa);
  for (int i = 0; i < count; i++) {
    tiny.run(4);
    const pid_t child = fork();
    if (child == 0) {
      alarm(1);
      bool right = true;
      for (int n = 0; n < 100; n++) right &= tiny.run(n % 5 + 1);
      _exit(!right);
    }
    int status = 1;
    expect(child > 0 && waitpid(child, &status, 0) == child && status == 0, "steps in a forked child");
  }
  over = true;
  other.join();
  expect(ok, "steps beside forks");
}

}  // namespace

#if defined(__linux__)
extern "C" int clock_gettime(clockid_t clock, timespec* time) {
  static thread_local uint32_t state = uint32_t(reinterpret_cast<uintptr_t>(&state) >> 12);
  state = state * 1664525 + 1013904223;
  if (clocks_lose_time && state >> 29 == 0)
    for (volatile uint32_t i = state >> 18 & 2047; i > 0; i = i - 1) {}
  return int(syscall(SYS_clock_gettime, clock, time));
}
#endif

// The threads that run a plan: one pool per process, shared by all models; OpenMP is not used.
#pragma once
#include <cstdint>

namespace pentad {

// Addresses that a thread will read from next; null: none.
struct Prefetch {
  const uint8_t* addresses[3];
};

// Phases that run one after the other. Any thread may run any chunk of the current phase. Each phase is divided into
// shares of neighboring chunks. `prefetch` gives the addresses that a share will read first after `phase`.
struct Job {
  int phases;
  int (*chunks)(const void* context, int phase);
  void (*work)(const void* context, int phase, int chunk);
  Prefetch (*prefetch)(const void* context, int phase, int share, int shares);  // or null
  const void* context;
};

// The first chunk of a share.
constexpr int first_chunk(int chunks, int share, int shares) { return int(int64_t(chunks) * share / shares); }

// Runs a job on the calling thread and up to `threads` - 1 workers, and returns when it is done. Several threads may call
// this at once: their jobs run one after the other. A forked child starts its own workers at its first job.
void run_on_pool(const Job& job, int threads);

}  // namespace pentad

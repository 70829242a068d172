// The threads that run a plan: one pool a process, shared by all models, without OpenMP.
#pragma once

namespace pentad {

// Phases that follow each other; the chunks of one may be done by any thread in any order.
struct Job {
  int phases;
  int (*chunks)(const void* context, int phase);
  void (*work)(const void* context, int phase, int chunk);
  const void* context;
};

// Runs a job on the calling thread and up to `threads` - 1 others; returns when all of it is done. Calls from several
// threads follow each other.
void run_on_pool(const Job& job, int threads);

}  // namespace pentad

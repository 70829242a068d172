// The threads that run a plan: one pool a process, shared by all models, without OpenMP.
#pragma once
#include <cstdint>

namespace pentad {

// Where memory is that will be read from there on; null: nowhere.
struct Next {
  const uint8_t* at[3];
};

// Phases that follow each other; the chunks of one may be done by any thread in any order. In how many shares they are
// cut, each of neighboring chunks, is told to `next`, which says where a share of what follows a phase begins to read.
struct Job {
  int phases;
  int (*chunks)(const void* context, int phase);
  void (*work)(const void* context, int phase, int chunk);
  Next (*next)(const void* context, int phase, int share, int shares);  // or null
  const void* context;
};

// The first of a share's chunks.
constexpr int first_chunk(int chunks, int share, int shares) { return int(int64_t(chunks) * share / shares); }

// Runs a job on the calling thread and up to `threads` - 1 others; returns when all of it is done. Calls from several
// threads follow each other.
void run_on_pool(const Job& job, int threads);

}  // namespace pentad

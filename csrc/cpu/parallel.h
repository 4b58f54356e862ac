// A parallel loop over tasks on the pool that torch uses too (one libgomp in the process).
//
// A child of fork() inherits libgomp's pool without its threads and would wait for them for ever (an op inside a forked
// DataLoader worker): there the loop runs serially.  Which thread runs a task never changes a bit of the result.
#pragma once

#include <cstdint>

namespace endomamba {

bool in_forked_child();

template <class F>
void parallel_for(int64_t tasks, int threads, const F& body) {
  if (tasks <= 1 || threads <= 1 || in_forked_child()) {
    for (int64_t i = 0; i < tasks; ++i) body(i);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < tasks; ++i) body(i);
}

}  // namespace endomamba

// The emulator's positive controls.
#pragma once
#include <cstdint>

namespace branchwise::cuda {

// Runs a kernel, with a mistake or without: 0 a missing barrier, 1 a copy read before it is waited
// for, 2 lanes that part before a collective, 3 a warp that leaves before a barrier. Returns how
// many wrong values were read; 2 and 3 throw.
int64_t run_fault(int64_t kind, bool planted);

}  // namespace branchwise::cuda

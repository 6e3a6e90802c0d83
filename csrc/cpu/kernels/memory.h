// How this CPU is asked for memory ahead.
#pragma once

namespace branchwise {

// Whether it is AMD's. There (measured on a Zen 5) lines are asked for into the first cache level,
// scattered pages one after another, and slots in a row without a touch further ahead; Intel's are
// faster the other way round in all three. Set when the library is loaded.
extern const bool amd_memory;

}  // namespace branchwise

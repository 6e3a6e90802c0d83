// How this CPU is asked for memory ahead.
#pragma once

namespace branchwise {

// Whether it is AMD's. There lines are asked for into the first cache level, scattered pages one
// after another, and slots in a row without a touch further ahead: each measured on a Zen 5. On
// others it is the other way round, which was measured on an Intel Xeon; there the touch may cost
// as often as it helps. Set when the library is loaded.
extern const bool amd_memory;

}  // namespace branchwise

// What a page is summarised by. Torch-free.
#pragma once

namespace branchwise {

enum class Summary : int { min_max, mean };

}  // namespace branchwise

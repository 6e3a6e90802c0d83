// How sure a model is of a row's token; see the Python wrapper of confidence. Torch-free.
#pragma once

namespace branchwise {

enum class Score : int { probability, margin, entropy };

}  // namespace branchwise

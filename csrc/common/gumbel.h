// Gumbel noise of a row's token: a function of the row's key and the token. Torch-free.
#pragma once
#include <cmath>

#include "common/philox.h"

namespace branchwise {

// Noise lies between these.
constexpr double kGumbelLow = -3.2, kGumbelHigh = 23.0;

BW_HOST_DEVICE inline double gumbel(int64_t key, int64_t token) {
  const Words4 words =
      philox(static_cast<uint64_t>(key), {{static_cast<uint32_t>(token / 4), 0x64696666, 0, 0}});
  // An index that is not constant would put the words on a GPU's stack.
  const uint32_t* w = words.word;
  const uint32_t word = token % 4 == 0   ? w[0]
                        : token % 4 == 1 ? w[1]
                        : token % 4 == 2 ? w[2]
                                         : w[3];
  const double u = (word + 0.5) * 0x1p-32;
  return -log(-log(u));
}

}  // namespace branchwise

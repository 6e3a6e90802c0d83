// The steps of a masked-diffusion decoder, on device pointers: a block per row of the batch. All
// return the CUDA error code of their launch.
#pragma once
#include "common/blocks_args.h"

namespace branchwise::cuda {

// Bytes of shared memory that windows of W tokens need.
constexpr int64_t blocks_bytes(int64_t W) { return 8 * W + 4 * W + 256; }

struct DraftBlocksLaunch {
  BlockSteps steps;
  const int64_t* window;  // [B, W]
  int64_t* drafts;        // [B, K, W]
  int32_t* num_drafts;    // [B]
};
int draft_blocks(const DraftBlocksLaunch& launch, void* stream);

struct VerifyBlocksLaunch {
  BlockSteps steps;
  const int64_t* drafts;      // [B, K, W]
  const int32_t* num_drafts;  // [B]
  int32_t* accepted;          // [B]
};
int verify_blocks(const VerifyBlocksLaunch& launch, void* stream);

}  // namespace branchwise::cuda

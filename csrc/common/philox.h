// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3" (SC 2011): four random words are a function of a key and a counter, so noise depends on
// what it is for and on nothing else. Integer arithmetic only: the same on every device.
#pragma once
#include <cstdint>

#include "common/device.h"

namespace branchwise {

struct Words4 {
  uint32_t word[4];
};

BW_HOST_DEVICE inline Words4 philox(uint64_t key, Words4 counter) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t* c = counter.word;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
    counter = {{static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)}};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return counter;
}

// Uniform on the multiples of 2^-24 in [0, 1), all of which a float holds.
BW_HOST_DEVICE inline float to_uniform(uint32_t word) {
  return static_cast<float>(word >> 8) * 0x1p-24f;
}

// The noise of one node: two uniforms, of which rules use the first to accept and the second to
// draw a token.
struct NodeNoise {
  float accept, draw;
};
BW_HOST_DEVICE inline NodeNoise node_noise(int64_t seed, int64_t row, int64_t round, int64_t node,
                                           int64_t purpose) {
  const Words4 words = philox(static_cast<uint64_t>(seed),
                              {{static_cast<uint32_t>(row), static_cast<uint32_t>(round),
                                static_cast<uint32_t>(node), static_cast<uint32_t>(purpose)}});
  return {to_uniform(words.word[0]), to_uniform(words.word[1])};
}

}  // namespace branchwise

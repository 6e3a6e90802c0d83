// What an acceptance rule has left of the target's distribution at one node, worked out by a block:
// the arithmetic of cpu/residual.h, which has the explanation. All threads call every method
// together, with the same arguments, and get the same answers.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernels/eight-inl.cuh"

namespace branchwise::cuda {

constexpr int kBlockThreads = 512, kBlockWarps = kBlockThreads / kWarp;
constexpr int kMostChunks = 1024;
constexpr int kLaneTokens = 8;  // next to each other
constexpr double kNoMass = 1e-12;

// A token that a residual treats apart: of its own weight, and out of the draft or not.
struct Gone {
  int64_t token;
  double weight;
  int32_t from_draft;
};

// The block's shared memory. Sums per chunk are those of the residual that was changed last.
struct Scratch {
  float mass[kMostChunks], q_mass[kMostChunks], largest[kMostChunks];
  double total[2];
  float best[kBlockWarps];
  int64_t best_at[kBlockWarps];
  int64_t drawn;
};

// Tokens of a chunk: whole rounds of a warp, as many as keep the chunks few.
__device__ inline int64_t chunk_size(int64_t V) {
  const int64_t round = kWarp * kLaneTokens;
  return (V + round * kMostChunks - 1) / (round * kMostChunks) * round;
}

// The sum of an array of chunks, in one order always: a warp adds up.
__device__ inline void total_of(const float* chunks, int64_t count, double* out) {
  if (threadIdx.x < kWarp) {
    double sum = 0;
    for (int64_t c = threadIdx.x; c < count; c += kWarp) sum += chunks[c];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) *out = sum;
  }
}

// The lowest index of the row's largest logit.
template <typename Element>
__device__ int64_t block_argmax(const Element* row, int64_t V, Scratch& s) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float best = -INFINITY;
  int64_t best_at = V;
#pragma unroll 4
  for (int64_t at = int64_t{threadIdx.x} * kLaneTokens; at < V; at += kBlockThreads * kLaneTokens) {
    float x[kLaneTokens];
    load_eight(row, at, V, -INFINITY, x);
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i)
      if (x[i] > best) {
        best = x[i];
        best_at = at + i;
      }
  }
  const auto join = [&](float other, int64_t other_at) {
    if (other > best || (other == best && other_at < best_at)) {
      best = other;
      best_at = other_at;
    }
  };
  for (int i = kWarp / 2; i > 0; i /= 2) join(shuffle_xor(best, i), shuffle_xor(best_at, i));
  sync_block();  // the last one's readers are done
  if (lane == 0) {
    s.best[warp] = best;
    s.best_at[warp] = best_at;
  }
  sync_block();
  for (int w = 0; w < kBlockWarps; ++w) join(s.best[w], s.best_at[w]);
  return best_at < V ? best_at : 0;
}

template <typename Element>
struct BlockResidual {
  const Element* row;
  const float* q;  // null for rules that do not read it
  int64_t V;
  float scale, top;
  float target, draft;  // weights: max(target p - draft q, 0)
  double mass, q_mass, q_gone;
  Gone* gone;
  int32_t num_gone;

  // R = softmax of the row; `arena` has room for what leaves.
  __device__ void begin(const Element* logits, const float* drafted, int64_t size, float by,
                        Gone* arena, Scratch& s) {
    row = logits;
    q = drafted;
    V = size;
    scale = by;
    target = 1.f;
    draft = 0.f;
    q_mass = 1;
    q_gone = 0;
    gone = arena;
    num_gone = 0;
    const int64_t size_of = chunk_size(V), chunks = (V + size_of - 1) / size_of;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    sync_block();
#pragma unroll 2
    for (int64_t c = warp; c < chunks; c += kBlockWarps) {
      float highest = -INFINITY, sum = 0.f;
      for (int64_t at = c * size_of + lane * kLaneTokens;
           at - lane * kLaneTokens < (c + 1) * size_of; at += kWarp * kLaneTokens) {
        float x[kLaneTokens], most = highest;
        load_eight(row, at, V, -INFINITY, x);
#pragma unroll
        for (int i = 0; i < kLaneTokens; ++i) most = fmaxf(most, x[i]);
        most = warp_max(most);
        const float shift = most == -INFINITY ? 0.f : most;
        sum *= exp2f((highest - shift) * scale);
#pragma unroll
        for (int i = 0; i < kLaneTokens; ++i) sum += exp2f((x[i] - shift) * scale);
        highest = most;
      }
      sum = warp_sum(sum);
      if (lane == 0) {
        s.largest[c] = highest;
        s.mass[c] = sum;
      }
    }
    sync_block();
    top = -INFINITY;
    for (int64_t c = lane; c < chunks; c += kWarp) top = fmaxf(top, s.largest[c]);
    top = warp_max(top);
    sync_block();
    const float shift = top == -INFINITY ? 0.f : top;
    for (int64_t c = threadIdx.x; c < chunks; c += kBlockThreads)
      s.mass[c] *= exp2f((s.largest[c] - shift) * scale);
    sync_block();
    add_up(s, false);
  }

  __device__ bool valid() const { return mass > 0 && mass < INFINITY && top < INFINITY; }

  __device__ float plain_weight(int64_t token) const {
    float w = target * exp2f((to_float(row[token]) - top) * scale);
    if (q != nullptr) w = fmaxf(w - draft * q[token], 0.f);
    return w;
  }
  __device__ double weight(int64_t token) const {
    for (int32_t i = 0; i < num_gone; ++i)
      if (gone[i].token == token) return gone[i].weight;
    return plain_weight(token);
  }
  __device__ double probability(int64_t token) const { return weight(token) / mass; }
  __device__ double drafted(int64_t token) const {
    for (int32_t i = 0; i < num_gone; ++i)
      if (gone[i].token == token && gone[i].from_draft != 0) return 0;
    return q_mass > 0 ? q[token] / q_mass : 0;
  }

  // Sums of all chunks, gone tokens by their own weights.
  __device__ void recompute(Scratch& s) {
    const int64_t size_of = chunk_size(V), chunks = (V + size_of - 1) / size_of;
    sync_block();
    for (int64_t c = threadIdx.x / kWarp; c < chunks; c += kBlockWarps) sum_chunk(c, s);
    sync_block();
    add_up(s, q != nullptr);
  }

  // R(token) = 0, unless nothing would be left.
  __device__ void remove(int64_t token, Scratch& s) {
    const double before = mass;
    push({token, 0, 0});
    const int64_t chunk = token / chunk_size(V);
    if (threadIdx.x < kWarp) sum_chunk(chunk, s);
    sync_block();
    add_up(s, false);
    if (mass > kNoMass * before) return;
    --num_gone;
    recompute(s);
  }

  // R = norm(max(accepted R - D, 0)), and token leaves D if draws are not replaced. Returns the
  // mass before normalising; 0 leaves R as it is.
  __device__ double subtract(double accepted, int64_t token, bool replacement, Scratch& s) {
    const BlockResidual old = *this;
    const double shrink = accepted / mass, old_weight = weight(token);
    if (!replacement) {
      const double left = old_weight - drafted(token) / shrink;
      push({token, left > 0 ? left : 0, 1});
      q_gone += q[token];
    }
    scale_gone(shrink);
    draft = static_cast<float>(draft * shrink + 1 / q_mass);
    target = static_cast<float>(target * shrink);
    recompute(s);
    const double left = mass, q_left = s.total[1], q_left_out = q_gone;
    if (left > kNoMass && left < INFINITY) {
      q_mass = q_left;
      return left;
    }
    *this = old;
    scale_gone(1 / shrink);
    if (!replacement) push({token, old_weight, 1});
    q_mass = q_left;
    q_gone = q_left_out;
    recompute(s);
    return 0;
  }

  // The first token whose cumulative share exceeds u.
  __device__ int64_t draw(float u, Scratch& s) const {
    const int64_t size_of = chunk_size(V), chunks = (V + size_of - 1) / size_of;
    sync_block();
    if (threadIdx.x < kWarp) {
      const int lane = threadIdx.x;
      const double goal = u * mass;
      // A lane has the chunks next to each other, then, of the one that is hit, the tokens.
      const int64_t each = (chunks + kWarp - 1) / kWarp;
      const Found chunk = find(goal, each, [&](int64_t i) {
        const int64_t c = lane * each + i;
        return c < chunks ? double{s.mass[c]} : 0.0;
      });
      const int64_t hit = chunk.at, begin = hit * size_of;
      const int64_t tokens = size_of / kWarp;
      const auto token_weight = [&](int64_t i) {
        const int64_t token = begin + lane * tokens + i;
        return token < V ? weight(token) : 0.0;
      };
      double in_chunk = 0;
      for (int64_t i = 0; i < tokens; ++i) in_chunk += token_weight(i);
      in_chunk = warp_sum(in_chunk);
      const double share = s.mass[hit];
      const Found token = find(in_chunk * (goal - chunk.before) / share, tokens, token_weight);
      if (lane == 0) s.drawn = begin + token.at;
    }
    sync_block();
    return s.drawn;
  }

  // Entropy of the untouched row, in nats: H(p) = ln(mass) - sum_i w_i ln(w_i) / mass.
  __device__ double entropy(Scratch& s) const {
    const int64_t size_of = chunk_size(V), chunks = (V + size_of - 1) / size_of;
    const int lane = threadIdx.x % kWarp;
    sync_block();
    for (int64_t c = threadIdx.x / kWarp; c < chunks; c += kBlockWarps) {
      float sum = 0.f;
      for (int64_t at = c * size_of + lane; at < (c + 1) * size_of && at < V; at += kWarp) {
        const float bits = (to_float(row[at]) - top) * scale, w = exp2f(bits);
        if (w > 0.f) sum += w * bits;
      }
      sum = warp_sum(sum);
      if (lane == 0) s.largest[c] = sum;
    }
    sync_block();
    total_of(s.largest, chunks, &s.total[1]);
    sync_block();
    return log(mass) - log(2.0) * s.total[1] / mass;
  }

 private:
  __device__ void push(const Gone& entry) {
    sync_block();  // readers of what was here before
    if (threadIdx.x == 0) gone[num_gone] = entry;
    ++num_gone;
    sync_block();
  }
  __device__ void scale_gone(double by) {
    sync_block();
    for (int32_t i = threadIdx.x; i < num_gone; i += kBlockThreads) gone[i].weight *= by;
    sync_block();
  }

  // Called by whole warps.
  __device__ void sum_chunk(int64_t c, Scratch& s) const {
    const int64_t size_of = chunk_size(V), begin = c * size_of;
    const int lane = threadIdx.x % kWarp;
    float sum = 0.f, q_sum = 0.f;
    for (int64_t at = begin + lane * kLaneTokens; at - lane * kLaneTokens < begin + size_of;
         at += kWarp * kLaneTokens) {
      float x[kLaneTokens], drafts[kLaneTokens] = {};
      load_eight(row, at, V, -INFINITY, x);
      if (q != nullptr) load_eight(q, at, V, 0.f, drafts);
#pragma unroll
      for (int i = 0; i < kLaneTokens; ++i)
        x[i] = fmaxf(target * exp2f((x[i] - top) * scale) - draft * drafts[i], 0.f);
      for (int32_t g = 0; g < num_gone; ++g)
#pragma unroll
        for (int i = 0; i < kLaneTokens; ++i)
          if (gone[g].token == at + i) {
            x[i] = static_cast<float>(gone[g].weight);
            if (gone[g].from_draft != 0) drafts[i] = 0.f;
          }
#pragma unroll
      for (int i = 0; i < kLaneTokens; ++i) {
        sum += x[i];
        q_sum += drafts[i];
      }
    }
    sum = warp_sum(sum);
    q_sum = warp_sum(q_sum);
    if (lane == 0) {
      s.mass[c] = sum;
      s.q_mass[c] = q_sum;
    }
  }

  __device__ void add_up(Scratch& s, bool with_q) {
    const int64_t size_of = chunk_size(V), chunks = (V + size_of - 1) / size_of;
    total_of(s.mass, chunks, &s.total[0]);
    if (with_q) total_of(s.q_mass, chunks, &s.total[1]);
    sync_block();
    mass = s.total[0];
  }

  struct Found {
    int64_t at;
    double before;  // what came before it
  };
  // Which of 32 * each values the cumulative sum passes `goal` at; the last positive one if none.
  template <typename Value>
  __device__ static Found find(double goal, int64_t each, const Value& value) {
    const int lane = threadIdx.x % kWarp;
    double own = 0;
    for (int64_t i = 0; i < each; ++i) own += value(i);
    double before = 0;
    for (int i = 0; i < kWarp; ++i) {  // in ascending order
      const double other = shuffle(own, i);
      if (i < lane) before += other;
    }
    Found found{-1, 0}, last{-1, 0};
    double sum = before;
    for (int64_t i = 0; i < each && found.at < 0; ++i) {
      const double v = value(i);
      if (!(v > 0)) continue;
      last = {lane * each + i, sum};
      if (sum + v > goal) found = last;
      sum += v;
    }
    const uint32_t hits = ballot(found.at >= 0), positive = ballot(last.at >= 0);
    const int from = hits != 0       ? lowest_bit(hits)
                     : positive != 0 ? 31 - leading_zeros(positive)
                                     : 0;
    const int64_t at = shuffle(hits != 0 ? found.at : last.at, from);
    return {at < 0 ? 0 : at, shuffle(hits != 0 ? found.before : last.before, from)};
  }
};

}  // namespace branchwise::cuda

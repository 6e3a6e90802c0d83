// The matrix kernel of attention: 16-bit elements, tensor cores, tiles of 64 places that arrive
// while those before them are computed.
//
// Warps form a grid: warps_m of them share out the rows, 16 each, warps_k the places of a tile.
// With few rows a block's four warps each take a quarter of every tile, and join their results at
// the end, in fixed order.
#pragma once

#include "cuda/kernels/places-inl.cuh"

namespace branchwise::cuda {

// A matrix in shared memory, rows of 16-byte chunks. Chunks are permuted within 128 bytes by the
// row, so that the eight rows that a load of matrices touches lie in different banks.
template <int HeadDim>
struct SharedRows {
  static constexpr int kRowBytes = row_pitch(HeadDim) * 2;
  char* base;
  __device__ static int offset(int row, int c) { return row * kRowBytes + ((c ^ (row & 7)) << 4); }
  __device__ char* chunk(int row, int c) const { return base + offset(row, c); }
};

// Where a lane reads from as it goes through the chunks of its row two by two, with an even or an
// odd one each time: the permutation repeats every eight chunks, so four offsets do.
template <int HeadDim>
struct LaneReader {
  int offsets[4];
  __device__ LaneReader(int row, int odd) {
#pragma unroll
    for (int k = 0; k < 4; ++k) offsets[k] = SharedRows<HeadDim>::offset(row, 2 * k + odd);
  }
  // The k-th pair of chunks, `below` rows further down: a multiple of eight.
  __device__ const char* at(const SharedRows<HeadDim>& rows, int k, int below) const {
    return rows.base + offsets[k % 4] + k / 4 * 128 + below * SharedRows<HeadDim>::kRowBytes;
  }
};

// Scores of 16 rows by Keys places in the layout of the product: lane holds rows lane / 4 and 8
// below it, of every eight places two next to each other. Rows as an online softmax.
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.f, 0.f};

  // Replaces the scores by exp2(score - top), and returns what results so far must shrink by.
  template <int Tiles>
  __device__ void update(float (&s)[Tiles][4], float (&shrink)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = top[r];
#pragma unroll
      for (int n = 0; n < Tiles; ++n) highest = fmaxf(highest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      highest = fmaxf(highest, shuffle_xor(highest, 1));
      highest = fmaxf(highest, shuffle_xor(highest, 2));
      const float shift = highest == -INFINITY ? 0.f : highest;
      shrink[r] = exp2_approx(top[r] - shift);
      top[r] = highest;
      float added = 0.f;
#pragma unroll
      for (int n = 0; n < Tiles; ++n)
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          s[n][e] = exp2_approx(s[n][e] - shift);
          added += s[n][e];
        }
      sum[r] = sum[r] * shrink[r] + added;
    }
  }
};

// What all threads of a block need now and then: in shared memory, as registers are scarce.
struct BlockView {
  Places places;
  RowView rows[64];
  int64_t keys[2][kTile], values[2][kTile];  // where the places of two tiles lie
  uint32_t exist[8][2];                      // and which places of eight do
  bool finishes;                             // there is one split
};
static_assert(sizeof(BlockView) <= kBlockViewBytes);

template <typename Element, typename Stored, int HeadDim, int WarpsM, int WarpsK>
__global__ void __launch_bounds__(32 * WarpsM * WarpsK)
    attention_kernel(const __grid_constant__ AttentionLaunch in) {
  constexpr int kThreads = 32 * WarpsM * WarpsK, kRows = 16 * WarpsM;
  constexpr int kStages = stage_count(HeadDim), kPitch = row_pitch(HeadDim);
  constexpr int kKeys = kTile / WarpsK;
  constexpr int kTileBytes = kTile * kPitch * static_cast<int>(sizeof(Element));
  // Caches in e4m3: tiles arrive in rows without gaps, and one of keys and one of values are
  // unpacked when their turn comes.
  constexpr bool kUnpacks = sizeof(Stored) == 1;
  constexpr int kStageBytes = kUnpacks ? kTile * HeadDim : kTileBytes;
  // Where registers suffice: queries stay in them, and pages are looked up before a tile's
  // products, not after them.
  constexpr bool kSpare = HeadDim <= 128;
  using Rows = SharedRows<HeadDim>;

  const AttentionArgs& a = in.args;
  const Unit unit = unit_of_block(in);
  const int b = unit.b, h = unit.h, block = unit.block, split = unit.split;
  const int tid = threadIdx.x, warp = tid / kWarp, lane = tid % kWarp;
  const int wm = warp % WarpsM, wk = warp / WarpsM;
  const int G = static_cast<int>(a.Hq / a.Hkv);

  char* shared = shared_memory();
  const Rows query{shared};
  char* stages = shared + kRows * kPitch * static_cast<int>(sizeof(Element));
  char* unpacked = stages + kStages * 2 * kStageBytes;
  const auto stage = [&](int i, int which) {
    return stages + (i % kStages * 2 + which) * kStageBytes;
  };
  const auto keys = [&](int i) { return Rows{kUnpacks ? unpacked : stage(i, 0)}; };
  const auto values = [&](int i) { return Rows{kUnpacks ? unpacked + kTileBytes : stage(i, 1)}; };
  BlockView& view = *reinterpret_cast<BlockView*>(kUnpacks ? unpacked + 2 * kTileBytes : unpacked);

  const RowBlock rows = row_block(in, block);
  int64_t begin, end;
  int tiles;
  {
    const Places places = places_of(in, b, h, rows.first_token);
    const Span span = span_of(in, places, rows);
    if (split >= span.count) return;
    begin = span.begin_of(split);
    end = span.end_of(split);
    tiles = static_cast<int>((end - begin + kTile - 1) / kTile);
    if (tid == 0) {
      view.places = places;
      view.finishes = !in.by_stretch && span.count == 1;
    }
    if (tid < kRows)
      view.rows[tid] = view_of(a, places, b, min(rows.first + tid, rows.end - 1) / G);
  }

  // A thread copies one chunk of every few rows; chunks behind D are zeros.
  constexpr int kAcross = HeadDim / 8 <= 8 ? 8 : HeadDim / 8 <= 16 ? 16 : 32;
  const int chunk = tid % kAcross, first_row = tid / kAcross;
  const bool copies = chunk < HeadDim / 8, filled = chunk * 8 < a.D;
  // Threads look up where the places of tile i lie, one tile before it is asked for.
  const auto look_up = [&](int i) {
    return address_of(in, view.places, b, h, begin + int64_t{i} * kTile + tid, end);
  };
  const auto note = [&](int i, const Address& at) {
    view.keys[i % 2][tid] = at.key;
    view.values[i % 2][tid] = at.value;
    const uint32_t word = ballot(at.exists);
    if (lane == 0) view.exist[i % 8][warp] = word;
  };
  const auto which_exist = [&](int i) {
    return view.exist[i % 8][0] | uint64_t{view.exist[i % 8][1]} << 32;
  };
  const auto ask = [&](char* to, const void* cache, const int64_t* from, uint64_t exist) {
    if constexpr (kUnpacks) {
      constexpr int kChunks = HeadDim / 16;
      const int c = tid % kChunks;
#pragma unroll 4
      for (int row = tid / kChunks; row < kTile; row += kThreads / kChunks) {
        const bool valid = (exist >> row & 1) != 0 && c * 16 < a.D;
        const int64_t at = valid ? from[row] + c * 16 : 0;
        copy_async(to + row * HeadDim + c * 16, static_cast<const Stored*>(cache) + at, valid);
      }
      return;
    }
    if (!copies) return;
#pragma unroll 4
    for (int row = first_row; row < kTile; row += kThreads / kAcross) {
      const bool valid = (exist >> row & 1) != 0 && filled;
      const int64_t at = valid ? from[row] + chunk * 8 : 0;
      copy_async(Rows{to}.chunk(row, chunk), static_cast<const Stored*>(cache) + at, valid);
    }
  };
  const auto ask_tile = [&](int i) {
    const uint64_t exist = which_exist(i);
    ask(stage(i, 0), a.key_cache, view.keys[i % 2], exist);
    ask(stage(i, 1), a.value_cache, view.values[i % 2], exist);
  };
  const auto unpack = [&](int i) {
    constexpr int kPieces = HeadDim / 8;  // of a row, eight values each
    for (int which = 0; which < 2; ++which)
#pragma unroll 1
      for (int at = tid; at < kTile * kPieces; at += kThreads) {
        const auto* from = reinterpret_cast<const uint32_t*>(stage(i, which) + at * 8);
        auto* to = reinterpret_cast<uint32_t*>(
            Rows{unpacked + which * kTileBytes}.chunk(at / kPieces, at % kPieces));
        uint32_t low[2], high[2];
        unpack_e4m3<Element>(from[0], low);
        unpack_e4m3<Element>(from[1], high);
        to[0] = low[0];
        to[1] = low[1];
        to[2] = high[0];
        to[3] = high[1];
      }
  };

  // Queries, then all tiles but one that fit.
  for (int row = first_row; row < kRows && copies; row += kThreads / kAcross) {
    const int packed = rows.first + row;
    const bool valid = packed < rows.end && filled;
    const int64_t at = b * a.q_stride[0] + (h * G + packed % G) * a.q_stride[1] +
                       packed / G * a.q_stride[2] + chunk * 8;
    copy_async(query.chunk(row, chunk), static_cast<const Element*>(a.query) + (valid ? at : 0),
               valid);
  }
  sync_block();
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < tiles) {
      if (tid < kTile) note(i, look_up(i));
      sync_block();
      ask_tile(i);
    }
    commit_copies();
  }
  if (kStages - 1 < tiles && tid < kTile) note(kStages - 1, look_up(kStages - 1));

  const float stored_key = kUnpacks ? a.key_scale[h] : 1.f;
  const float scale = (a.softcap > 0.f ? a.scale / a.softcap : a.scale * kLog2e) * stored_key;
  const float cap = a.softcap * kLog2e;
  Softmax softmax;
  float out[HeadDim / 8][4] = {};
  uint32_t held[HeadDim / 16][4];
  // Lanes 8 i + r read row r of matrix i.
  const LaneReader<HeadDim> query_reader(16 * wm + lane % 16, lane / 16);
  const LaneReader<HeadDim> key_reader(wk * kKeys + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const LaneReader<HeadDim> value_reader(wk * kKeys + lane % 16, lane / 16);
  const auto load_query = [&](uint32_t (&q)[4], int k) {
    load_matrices(q, query_reader.at(query, k, 0));
  };

  for (int i = 0; i < tiles; ++i) {
    wait_copies<kStages - 2>();
    sync_block();
    const int next = i + kStages - 1;
    if (next < tiles) ask_tile(next);
    commit_copies();
    const bool looks_up = next + 1 < tiles && tid < kTile;
    Address ahead{};
    if (kSpare && looks_up) ahead = look_up(next + 1);
    if constexpr (kUnpacks) {
      unpack(i);
      sync_block();
    }
    if (kSpare && i == 0) {
#pragma unroll
      for (int k = 0; k < HeadDim / 16; ++k) load_query(held[k], k);
    }

    float scores[kKeys / 8][4] = {};
    const Rows key = keys(i), value = values(i);
#pragma unroll
    for (int k = 0; k < HeadDim / 16; ++k) {
      if (!kSpare) load_query(held[k], k);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t part[4];
        load_matrices(part, key_reader.at(key, k, 16 * n));
        multiply<Element>(scores[2 * n], held[k], part[0], part[1]);
        multiply<Element>(scores[2 * n + 1], held[k], part[2], part[3]);
      }
    }

    const int64_t place = begin + int64_t{i} * kTile;
    // Only tiles with nodes, with places that a window may hide, or at the end have hidden places.
    const bool masked = place + kTile > view.places.prefix || place + kTile > end ||
                        view.places.window > 0 || which_exist(i) != ~uint64_t{0};
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scores[n][e] *= scale;
        if (a.softcap > 0.f) scores[n][e] = cap * tanhf(scores[n][e]);
      }
    if (masked) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const RowView& row = view.rows[16 * wm + lane / 4 + 8 * r];
        uint64_t bits = visible(a, view.places, row, place, end) & which_exist(i);
        bits >>= wk * kKeys + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if ((bits >> (8 * n + e) & 1) == 0) scores[n][2 * r + e] = -INFINITY;
      }
    }
    float shrink[2];
    softmax.update(scores, shrink);
#pragma unroll
    for (int n = 0; n < HeadDim / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[n][e] *= shrink[e / 2];
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      const uint32_t p[4] = {pack<Element>(scores[2 * k][0], scores[2 * k][1]),
                             pack<Element>(scores[2 * k][2], scores[2 * k][3]),
                             pack<Element>(scores[2 * k + 1][0], scores[2 * k + 1][1]),
                             pack<Element>(scores[2 * k + 1][2], scores[2 * k + 1][3])};
#pragma unroll
      for (int n = 0; n < HeadDim / 16; ++n) {
        uint32_t part[4];
        load_transposed(part, value_reader.at(value, n, 16 * k));
        multiply<Element>(out[2 * n], p, part[0], part[1]);
        multiply<Element>(out[2 * n + 1], p, part[2], part[3]);
      }
    }
    if (looks_up) note(next + 1, kSpare ? ahead : look_up(next + 1));
  }

  // The stages make room for what every warp has computed.
  wait_copies<0>();
  sync_block();
  const float stored_value = kUnpacks ? a.value_scale[h] : 1.f;
  constexpr int kJoinedPitch = HeadDim + 8;
  float* joined = reinterpret_cast<float*>(stages);
  float* tops = joined + WarpsK * kRows * kJoinedPitch;
  float* sums = tops + WarpsK * kRows;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = wk * kRows + 16 * wm + lane / 4 + 8 * r;
    float sum = softmax.sum[r];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    if (lane % 4 == 0) {
      tops[row] = softmax.top[r];
      sums[row] = sum;
    }
#pragma unroll
    for (int n = 0; n < HeadDim / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        joined[row * kJoinedPitch + 8 * n + lane % 4 * 2 + e] = out[n][2 * r + e];
  }
  sync_block();
  for (int row = warp; row < rows.end - rows.first; row += kThreads / kWarp) {
    float top = -INFINITY, sum = 0.f, weight[WarpsK];
#pragma unroll
    for (int w = 0; w < WarpsK; ++w) top = fmaxf(top, tops[w * kRows + row]);
    const float shift = top == -INFINITY ? 0.f : top;
#pragma unroll
    for (int w = 0; w < WarpsK; ++w) {
      weight[w] = exp2_approx(tops[w * kRows + row] - shift);
      sum += weight[w] * sums[w * kRows + row];
    }
    const auto value = [&](int d) {
      float all = 0.f;
#pragma unroll
      for (int w = 0; w < WarpsK; ++w)
        all += weight[w] * joined[(w * kRows + row) * kJoinedPitch + d];
      return all * stored_value;
    };
    if (view.finishes) {
      const Finish f = finish_row(a, b, h, rows.first + row, top, sum, lane == 0);
      for (int d = lane; d < a.D; d += kWarp)
        from_float(value(d) * f.factor, static_cast<Element*>(a.out) + f.at + d);
    } else {
      float* partial = partial_of(in, b, h, block, split);
      for (int d = lane; d < a.D; d += kWarp) partial[row * a.D + d] = value(d);
      if (lane == 0) {
        partial[in.rows * a.D + row] = top;
        partial[in.rows * (a.D + 1) + row] = sum;
      }
    }
  }
}

template <typename Element, typename Stored, int HeadDim>
int launch_attention(const AttentionLaunch& in, const AttentionPlan& plan, void* stream) {
  const Grid grid(static_cast<unsigned>(in.splits * in.args.Hkv * in.blocks),
                  static_cast<unsigned>(in.B));
  const auto with = [&](auto* kernel) {
    return launch(kernel, grid, plan.threads(), plan.shared_bytes, stream, in);
  };
  switch (plan.warps_m) {
    case 1:
      return with(attention_kernel<Element, Stored, HeadDim, 1, 4>);
    case 2:
      return with(attention_kernel<Element, Stored, HeadDim, 2, 2>);
    default:
      if constexpr (HeadDim <= 128) return with(attention_kernel<Element, Stored, HeadDim, 4, 1>);
  }
  return -1;  // no such plan
}

}  // namespace branchwise::cuda

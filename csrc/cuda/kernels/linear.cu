// Linear layers whose rows do not depend on each other: no split of K, and every element the same
// chain of products in blocks of any size.
#include "cuda/device.cuh"
#include "cuda/kernels/linear.cuh"

namespace branchwise::cuda {
namespace {

constexpr int kDepth = 64;  // values of K that arrive together: rows of 128 bytes

// Chunks of 16 bytes are permuted by the row, so that the eight rows that a load of matrices
// touches lie in different banks.
__device__ inline char* chunk_of(char* tile, int row, int chunk) {
  return tile + row * 128 + ((chunk ^ (row & 7)) << 4);
}

// Warps share out a block's rows and columns; each has TilesM x TilesN products of 16 by 8.
template <typename Element, int WarpsM, int WarpsN, int TilesM, int TilesN, int Stages>
struct MatrixLinear {
  static constexpr int kThreads = kWarp * WarpsM * WarpsN;
  static constexpr int kRows = 16 * TilesM * WarpsM, kColumns = 8 * TilesN * WarpsN;
  static constexpr int kStageBytes = (kRows + kColumns) * kDepth * 2;

  __device__ static void run(const LinearArgs& a) {
    const int tid = threadIdx.x, warp = tid / kWarp, lane = tid % kWarp;
    const int first_row = warp % WarpsM * 16 * TilesM, first_column = warp / WarpsM * 8 * TilesN;
    // Blocks that follow one another share their weights.
    const int64_t row_blocks = (a.M + kRows - 1) / kRows;
    const int64_t m0 = blockIdx.x % row_blocks * kRows, n0 = blockIdx.x / row_blocks * kColumns;
    char* const shared = shared_memory();
    const auto ask = [&](int64_t tile) {
      char* const to = shared + tile % Stages * kStageBytes;
      const int chunk = tid % 8;
      const int64_t k = tile * kDepth + chunk * 8;
#pragma unroll 4
      for (int row = tid / 8; row < kRows + kColumns; row += kThreads / 8) {
        const bool of_x = row < kRows;
        const int64_t at = of_x ? m0 + row : n0 + row - kRows;
        const bool valid = k < a.K && at < (of_x ? a.M : a.N);
        const auto* from = static_cast<const Element*>(of_x ? a.x : a.weight);
        copy_async(chunk_of(to, row, chunk),
                   from + (valid ? at * (of_x ? a.K : a.weight_stride) + k : 0), valid);
      }
    };
    const int64_t tiles = (a.K + kDepth - 1) / kDepth;
    for (int i = 0; i < Stages - 1; ++i) {
      if (i < tiles) ask(i);
      commit_copies();
    }
    float sums[TilesM][TilesN][4] = {};
    for (int64_t tile = 0; tile < tiles; ++tile) {
      wait_copies<Stages - 2>();
      sync_block();
      if (tile + Stages - 1 < tiles) ask(tile + Stages - 1);
      commit_copies();
      char* const x = shared + tile % Stages * kStageBytes;
      char* const weight = x + kRows * kDepth * 2;
#pragma unroll
      for (int k = 0; k < kDepth / 32; ++k) {
        uint32_t w[TilesN][4];  // eight columns by four chunks of K
#pragma unroll
        for (int n = 0; n < TilesN; ++n)
          load_matrices(w[n], chunk_of(weight, first_column + 8 * n + lane % 8, 4 * k + lane / 8));
#pragma unroll
        for (int half_k = 0; half_k < 2; ++half_k)
#pragma unroll
          for (int m = 0; m < TilesM; ++m) {
            uint32_t rows[4];
            load_matrices(
                rows, chunk_of(x, first_row + 16 * m + lane % 16, 4 * k + 2 * half_k + lane / 16));
#pragma unroll
            for (int n = 0; n < TilesN; ++n)
              multiply<Element>(sums[m][n], rows, w[n][2 * half_k], w[n][2 * half_k + 1]);
          }
      }
    }
#pragma unroll
    for (int m = 0; m < TilesM; ++m)
#pragma unroll
      for (int n = 0; n < TilesN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t row = m0 + first_row + 16 * m + lane / 4 + e / 2 * 8;
          const int64_t column = n0 + first_column + 8 * n + lane % 4 * 2 + e % 2;
          if (row >= a.M || column >= a.N) continue;
          const float bias =
              a.bias == nullptr ? 0.f : to_float(static_cast<const Element*>(a.bias)[column]);
          from_float(sums[m][n][e] + bias, static_cast<Element*>(a.out) + row * a.N + column);
        }
  }
};

template <typename Form>
__global__ void __launch_bounds__(Form::kThreads)
    matrix_linear_kernel(const __grid_constant__ LinearArgs args) {
  Form::run(args);
}

int64_t blocks_of(const LinearArgs& a, int64_t rows, int64_t columns) {
  return (a.M + rows - 1) / rows * ((a.N + columns - 1) / columns);
}

template <typename Form>
int launch_form(const LinearArgs& a, int stages, void* stream) {
  return launch(matrix_linear_kernel<Form>,
                Grid(static_cast<unsigned>(blocks_of(a, Form::kRows, Form::kColumns))),
                Form::kThreads, stages * Form::kStageBytes, stream, a);
}

// Few rows: weights arrive as they are, 32 columns of them per block so that all of the chip asks
// for some. Many rows: as few reads as fit the registers.
template <typename Element>
int launch_matrix_linear(const LinearArgs& a, void* stream) {
  if (a.M <= 16) return launch_form<MatrixLinear<Element, 1, 4, 1, 1, 8>>(a, 8, stream);
  if (a.M <= 64) return launch_form<MatrixLinear<Element, 2, 2, 2, 2, 4>>(a, 4, stream);
  return launch_form<MatrixLinear<Element, 2, 4, 4, 4, 3>>(a, 3, stream);
}

// fp32, and what is not on 16 bytes: 16 by 16 threads, each with RowsEach by kColumnsEach sums.
constexpr int kSide = 16, kColumnsEach = 4;
template <typename Element, int RowsEach>
__global__ void __launch_bounds__(kSide* kSide)
    plain_linear_kernel(const __grid_constant__ LinearArgs a) {
  constexpr int kRows = kSide * RowsEach, kColumns = kSide * kColumnsEach, kPitch = kSide + 1;
  const int tid = threadIdx.x, across = tid % kSide, down = tid / kSide;
  const int64_t row_blocks = (a.M + kRows - 1) / kRows;
  const int64_t m0 = blockIdx.x % row_blocks * kRows, n0 = blockIdx.x / row_blocks * kColumns;
  float* const x = reinterpret_cast<float*>(shared_memory());
  float* const weight = x + kRows * kPitch;
  float sums[RowsEach][kColumnsEach] = {};
  for (int64_t k0 = 0; k0 < a.K; k0 += kSide) {
    const int64_t k = k0 + across;
    for (int row = down; row < kRows; row += kSide) {
      const bool valid = m0 + row < a.M && k < a.K;
      x[row * kPitch + across] =
          valid ? to_float(static_cast<const Element*>(a.x)[(m0 + row) * a.K + k]) : 0.f;
    }
    for (int row = down; row < kColumns; row += kSide) {
      const bool valid = n0 + row < a.N && k < a.K;
      const int64_t at = (n0 + row) * a.weight_stride + k;
      weight[row * kPitch + across] =
          valid ? to_float(static_cast<const Element*>(a.weight)[at]) : 0.f;
    }
    sync_block();
    const int depth = static_cast<int>(min(a.K - k0, int64_t{kSide}));
    for (int i = 0; i < depth; ++i)
#pragma unroll
      for (int r = 0; r < RowsEach; ++r)
#pragma unroll
        for (int c = 0; c < kColumnsEach; ++c)
          sums[r][c] +=
              x[(down + r * kSide) * kPitch + i] * weight[(across + c * kSide) * kPitch + i];
    sync_block();
  }
#pragma unroll
  for (int r = 0; r < RowsEach; ++r)
#pragma unroll
    for (int c = 0; c < kColumnsEach; ++c) {
      const int64_t row = m0 + down + r * kSide, column = n0 + across + c * kSide;
      if (row >= a.M || column >= a.N) continue;
      const float bias =
          a.bias == nullptr ? 0.f : to_float(static_cast<const Element*>(a.bias)[column]);
      from_float(sums[r][c] + bias, static_cast<Element*>(a.out) + row * a.N + column);
    }
}

template <typename Element, int RowsEach>
int launch_plain_linear(const LinearArgs& a, void* stream) {
  constexpr int kRows = kSide * RowsEach, kColumns = kSide * kColumnsEach;
  return launch(plain_linear_kernel<Element, RowsEach>,
                Grid(static_cast<unsigned>(blocks_of(a, kRows, kColumns))), kSide * kSide,
                (kRows + kColumns) * (kSide + 1) * 4, stream, a);
}

}  // namespace

int linear(const LinearArgs& a, bool aligned, void* stream) {
  if (aligned)
    return a.type == DType::bf16 ? launch_matrix_linear<bf16>(a, stream)
                                 : launch_matrix_linear<half>(a, stream);
  return dispatch(a.type, [&](auto element) {
    using Element = decltype(element);
    return a.M <= kSide ? launch_plain_linear<Element, 1>(a, stream)
                        : launch_plain_linear<Element, 4>(a, stream);
  });
}

}  // namespace branchwise::cuda

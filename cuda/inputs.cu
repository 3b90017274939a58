// x as bfloat16 for the product. A float16 is the sum of two bfloat16s and a float32 that of three, exactly: where the
// mma has columns to spare, they cost nothing.
#include "inputs.cuh"
#include "values.cuh"

namespace {

using namespace infold;

constexpr int kThreads = 256;

// One of the parts that a value is the sum of, each of its next eight bits. What is not finite has one.
__device__ uint16_t part_of(float value, int part) {
  for (int i = 0; i < part; ++i) value -= from_bf16(upper_half(value));
  if (is_nan(value)) return part == 0 ? to_bf16(value) : 0;
  return upper_half(value);
}

// Of what is beyond x, zero.
__device__ uint16_t input(const InfoldInputs& p, int column, int col) {
  const int row = column / p.parts;
  if (row >= p.batch || col >= p.cols) return 0;
  const size_t index = static_cast<size_t>(row) * p.cols + col;
  // As it is, so that a NaN keeps its bits.
  if (p.dtype == INFOLD_BF16) return static_cast<const uint16_t*>(p.x)[index];
  return part_of(load_value(p.x, index, p.dtype), column % p.parts);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) infold_inputs_rows(InfoldInputs p) {
  const size_t index = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int column = static_cast<int>(index / p.cols);
  if (column < p.batch * p.parts) p.out[index] = input(p, column, static_cast<int>(index % p.cols));
}

extern "C" __global__ void __launch_bounds__(kThreads) infold_inputs_tiles(InfoldInputs p) {
  const size_t index = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int chunk = static_cast<int>(index % inputs::kChunks);
  const int column = static_cast<int>(index / inputs::kChunks % p.columns);
  const int tile = static_cast<int>(index / inputs::kChunks / p.columns);
  if (tile * kCols >= p.cols) return;
  uint16_t values[inputs::kChunk];
#pragma unroll
  for (int i = 0; i < inputs::kChunk; ++i)
    values[i] = input(p, column, tile * kCols + inputs::col_of(chunk, i, p.order));
  uint32_t words[inputs::kChunk / 2];
#pragma unroll
  for (int i = 0; i < inputs::kChunk / 2; ++i) {
    words[i] = values[2 * i] | static_cast<uint32_t>(values[2 * i + 1]) << 16;
  }
  reinterpret_cast<uint4*>(p.out)[inputs::chunk_index(tile, p.columns, column, chunk)] = {words[0], words[1], words[2],
                                                                                          words[3]};
}

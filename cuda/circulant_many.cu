// The block-circulant product of many rows in bfloat16. A block takes sixteen rows of x: their transforms are products
// with a small matrix, each frequency's product is one of a sixteenth of x's spectra by that frequency of the weights,
// and the inverse transforms are products again. Spectra stay in shared memory; where they were read, the results'
// take their place.
#include "circulant_many.cuh"
#include "intrinsics.cuh"
#include "log8.cuh"
#include "params.h"
#include "values.cuh"

namespace {

using namespace infold;
constexpr int kRowsEach = circulant::kRows;

__device__ uint32_t pack(float low, float high) { return to_bf16(low) | static_cast<uint32_t>(to_bf16(high)) << 16; }

// What a number of a slot is multiplied by at a time, from a period of a cosine.
template <int N>
__device__ float wave(const float (&cosines)[N], int slot, int part, int time) {
  if (slot == 0) return part == 1 && time % 2 == 1 ? -1.0f : 1.0f;
  return cosines[(slot * time + part * (N / 4)) % N];
}

// Eight bfloat16s of a row, zeros beyond it.
__device__ uint4 load_run(const uint16_t* row, int col, int cols, bool aligned) {
  if (aligned && col + 8 <= cols) return load_quad(row + col);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (col + i < cols) words[i / 2] |= static_cast<uint32_t>(load_half(row + col + i)) << 16 * (i % 2);
  }
  return {words[0], words[1], words[2], words[3]};
}

template <int N, int kFeatures>
struct Many {
  using Shape = circulant::Shape<N, kFeatures>;
  static constexpr int kThreads = Shape::kThreads, kWarps = kThreads / kLanes;
  static constexpr int kSteps = Shape::kSteps, kInputSteps = Shape::kInputSteps;
  static constexpr int kAhead = Shape::kAhead;
  // Tiles that the weights on their way are of.
  static constexpr int kTogether = kAhead > kInputSteps ? kAhead / kInputSteps : 1;

  const InfoldCirculant& p;
  uint32_t* regions;
  uint2 *forward, *inverse;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int group = lane / 4, column = lane % 4;

  // The transforms' matrices as operands B.
  __device__ void fill() const {
    __shared__ float cosines[N];
    for (int i = threadIdx.x; i < N; i += kThreads) cosines[i] = cosine_of_turns(static_cast<float>(i) / N);
    __syncthreads();
    for (int i = threadIdx.x; i < Shape::kMatrixWords / 2; i += kThreads) {
      const int own = i % kLanes, tile = i / kLanes % Shape::kGroups, step = i / kLanes / Shape::kGroups;
      uint32_t words[2][2];
#pragma unroll
      for (int high = 0; high < 2; ++high) {
        const int number = 8 * tile + own / 4, slot = Shape::slot_of_step(step, own, high);
        const int time = Shape::time_of_column(tile, own / 4);
        float to[2], back[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          to[e] = wave(cosines, number / 2, number % 2, Shape::time_of_step(step, own, high, e));
          back[e] = wave(cosines, slot, e, time);
        }
        words[0][high] = pack(to[0], to[1]);
        words[1][high] = pack(back[0], back[1]);
      }
      forward[i] = {words[0][0], words[0][1]};
      inverse[i] = {words[1][0], words[1][1]};
    }
  }

  // Operands A of a transform: two blocks of x.
  struct Inputs {
    uint32_t a[2][kSteps][4];
  };

  __device__ Inputs load_inputs(int first_row, int pair) const {
    const auto* x = static_cast<const uint16_t*>(p.x);
    const bool aligned = p.in_features % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
    Inputs result;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const int row = first_row + group + 8 * below;
        const int cols = row < p.batch ? p.in_features : 0;
        const int col = (2 * pair + half) * N + column * (N / 4);
#pragma unroll
        for (int step = 0; step < kSteps; step += 2) {
          const uint4 run = load_run(x + static_cast<size_t>(row) * p.in_features, col + 4 * step, cols, aligned);
          result.a[half][step][below] = run.x;
          result.a[half][step][below + 2] = run.y;
          result.a[half][step + 1][below] = run.z;
          result.a[half][step + 1][below + 2] = run.w;
        }
      }
    }
    return result;
  }

  // The spectra of x go to the regions.
  __device__ void transform(int first_row) const {
    constexpr int kPairs = Shape::kInputs / 2;
    for (int pair = warp; pair < kPairs; pair += kWarps) {
      const Inputs inputs = load_inputs(first_row, pair);
#pragma unroll 2
      for (int tile = 0; tile < Shape::kGroups; ++tile) {
        float sums[2][4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const uint2 b = forward[(step * Shape::kGroups + tile) * kLanes + lane];
          infold::multiply_add(sums[0], inputs.a[0][step], b.x, b.y);
          infold::multiply_add(sums[1], inputs.a[1][step], b.x, b.y);
        }
        uint32_t* region = regions + (4 * tile + column) * Shape::kRegion;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          auto* out = reinterpret_cast<uint2*>(region + Shape::input_place(part, pair, group));
          *out = {pack(sums[0][part], sums[1][part]), pack(sums[0][part + 2], sums[1][part + 2])};
        }
      }
    }
  }

  // Operands A of a slot: spectra of x.
  struct Spectra {
    uint32_t re[kInputSteps][4], im[kInputSteps][4];
  };

  __device__ Spectra load_spectra(const uint32_t* region) const {
    Spectra result;
#pragma unroll
    for (int step = 0; step < kInputSteps; ++step) {
      const uint4 re = *reinterpret_cast<const uint4*>(region + Shape::operand_place(0, step, lane));
      const uint4 im = *reinterpret_cast<const uint4*>(region + Shape::operand_place(1, step, lane));
      result.re[step][0] = re.x, result.re[step][1] = re.y, result.re[step][2] = re.z, result.re[step][3] = re.w;
      result.im[step][0] = im.x, result.im[step][1] = im.y, result.im[step][2] = im.z, result.im[step][3] = im.w;
    }
    return result;
  }

  // Each frequency's product, of `count` outputs from `first` on.
  __device__ void multiply(int first, int count) const {
    const int all = (p.outputs + 7) / 8, tiles = (count + 7) / 8;
    for (int slot = warp; slot < Shape::kSlots; slot += kWarps) {
      const uint32_t* weights = p.tiles + circulant::weight_place(slot, all, first / 8, kInputSteps, 0, lane);
      const auto load = [&](int index) { return load_quad(weights + static_cast<size_t>(index) * (4 * kLanes)); };
      uint4 ahead[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (i < tiles * kInputSteps) ahead[i] = load(i);
      }
      uint32_t* region = regions + slot * Shape::kRegion;
      const Spectra x = load_spectra(region);
      // All lanes have read what is overwritten.
      sync_warp();
      for (int start = 0; start < tiles; start += kTogether) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          const int tile = start + i;
          if (tile >= tiles) break;
          // Of real parts by real parts, imaginary by imaginary ones, and of one by the other.
          float real[4] = {}, imaginary[4] = {}, mixed[4] = {};
#pragma unroll
          for (int step = 0; step < kInputSteps; ++step) {
            const uint4 w = ahead[(i * kInputSteps + step) % kAhead];
            const int next = tile * kInputSteps + step + kAhead;
            if (next < tiles * kInputSteps) ahead[(i * kInputSteps + step) % kAhead] = load(next);
            infold::multiply_add(real, x.re[step], w.x, w.y);
            infold::multiply_add(imaginary, x.im[step], w.z, w.w);
            infold::multiply_add(mixed, x.re[step], w.z, w.w);
            infold::multiply_add(mixed, x.im[step], w.x, w.y);
          }
          store_product(region, slot, tile, real, imaginary, mixed);
        }
      }
    }
  }

  __device__ void store_product(uint32_t* region, int slot, int tile, float (&real)[4], const float (&imaginary)[4],
                                float (&mixed)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      mixed[i] = slot == 0 ? imaginary[i] : mixed[i];
      real[i] -= slot == 0 ? 0 : imaginary[i];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      auto* out = reinterpret_cast<uint2*>(region + Shape::output_place(8 * tile + 2 * column + i, group));
      *out = {pack(real[i], mixed[i]), pack(real[i + 2], mixed[i + 2])};
    }
  }

  // y of the outputs' spectra.
  __device__ void finish(int first_row, int first, int count) const {
    for (int output = warp; output < count; output += kWarps) {
      uint32_t a[kSteps][4];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int high = 0; high < 2; ++high) {
          const uint32_t* region = regions + Shape::slot_of_step(step, lane, high) * Shape::kRegion;
          const uint2 rows = *reinterpret_cast<const uint2*>(region + Shape::output_place(output, group));
          a[step][2 * high] = rows.x;
          a[step][2 * high + 1] = rows.y;
        }
      }
      const int first_col = (first + output) * N + column * (N / 4);
      uint32_t words[2][Shape::kGroups];
#pragma unroll
      for (int tile = 0; tile < Shape::kGroups; ++tile) {
        float sums[4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const uint2 b = inverse[(step * Shape::kGroups + tile) * kLanes + lane];
          infold::multiply_add(sums, a[step], b.x, b.y);
        }
        if (p.bias != nullptr) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int col = first_col + 2 * tile + e;
            const float bias = col < p.out_features ? load_value(p.bias, col, INFOLD_BF16) : 0;
            sums[e] += bias;
            sums[e + 2] += bias;
          }
        }
        words[0][tile] = pack(sums[0], sums[1]);
        words[1][tile] = pack(sums[2], sums[3]);
      }
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const int row = first_row + group + 8 * below;
        if (row < p.batch) store(words[below], row, first_col);
      }
    }
  }

  // A lane's neighbours in a row of y.
  __device__ void store(const uint32_t (&words)[Shape::kGroups], int row, int col) const {
    uint16_t* y = static_cast<uint16_t*>(p.y) + static_cast<size_t>(row) * p.out_features + col;
    if (p.out_features % 8 == 0 && col + N / 4 <= p.out_features) {
#pragma unroll
      for (int i = 0; i < Shape::kGroups; i += 4) {
        reinterpret_cast<uint4*>(y)[i / 4] = {words[i], words[i + 1], words[i + 2], words[i + 3]};
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      if (col + i < p.out_features) y[i] = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
    }
  }

  // A task is some rows and some outputs; those of the same rows are neighbours.
  __device__ void run() const {
    fill();
    __syncthreads();
    const int splits = (p.outputs + p.outputs_each - 1) / p.outputs_each;
    const int tasks = (p.batch + kRowsEach - 1) / kRowsEach * splits;
    for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
      const int first_row = task / splits * kRowsEach, first = task % splits * p.outputs_each;
      const int count = p.outputs - first < p.outputs_each ? p.outputs - first : p.outputs_each;
      transform(first_row);
      __syncthreads();
      prefetch_rows((task + gridDim.x) / splits * kRowsEach);
      multiply(first, count);
      __syncthreads();
      finish(first_row, first, count);
      // Before the regions are used again.
      __syncthreads();
    }
  }

  // The next task's rows of x come while this one's are multiplied.
  __device__ void prefetch_rows(int first_row) const {
    const int rows = p.batch - first_row < kRowsEach ? p.batch - first_row : kRowsEach;
    const auto* start = static_cast<const char*>(p.x) + static_cast<size_t>(first_row) * p.in_features * 2;
    for (int at = threadIdx.x * 128; at < rows * p.in_features * 2; at += kThreads * 128) prefetch(start + at);
  }

  __device__ static void start(const InfoldCirculant& p) {
    auto* regions = reinterpret_cast<uint32_t*>(dynamic_shared());
    auto* matrices = reinterpret_cast<uint2*>(regions + Shape::kSlots * Shape::kRegion);
    Many{p, regions, matrices, matrices + Shape::kMatrixWords / 2}.run();
  }
};

}  // namespace

// Lays the spectra out: a thread for each four words, of neighbouring slots first.
extern "C" __global__ void __launch_bounds__(256) infold_circulant_tiles(InfoldCirculant p) {
  const int slots = p.n / 2, steps = p.input_steps, tiles = (p.outputs + 7) / 8;
  const int index = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int slot = index % slots, lane = index / slots % kLanes;
  const int step = index / slots / kLanes % steps, tile = index / slots / kLanes / steps;
  if (tile >= tiles) return;
  const int output = 8 * tile + lane / 4;
  // A packed spectrum's numbers are those of an orthonormal transform, and times √2 where they stand for two.
  const float scale = square_root((slot == 0 ? 1.0f : 2.0f) / static_cast<float>(p.n));
  uint32_t words[4];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const float factor = part == 1 && p.conjugate && slot != 0 ? -scale : scale;
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      float values[2] = {};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int input = circulant::input_of(step, lane, high, e);
        if (output >= p.outputs || input >= p.inputs) continue;
        const size_t block =
            static_cast<size_t>(output) * p.output_stride + static_cast<size_t>(input) * p.input_stride;
        const size_t index = block * p.n + part * slots + slot;
        const bool is_log8 = p.spectrum_dtype == INFOLD_LOG8;
        values[e] = factor * (is_log8 ? log8::load(p.log8, index) : load_value(p.spectrum, index, p.spectrum_dtype));
      }
      words[2 * part + high] = pack(values[0], values[1]);
    }
  }
  auto* out = reinterpret_cast<uint4*>(p.tiles + circulant::weight_place(slot, tiles, tile, steps, step, lane));
  *out = {words[0], words[1], words[2], words[3]};
}

#define INFOLD_KERNEL(n, features)                                             \
  extern "C" __global__ void __launch_bounds__(Many<n, features>::kThreads, 1) \
      infold_circulant_many_##n##_##features(InfoldCirculant p) {              \
    Many<n, features>::start(p);                                               \
  }
INFOLD_KERNEL(32, 1024)
INFOLD_KERNEL(64, 1024)
INFOLD_KERNEL(128, 1024)
INFOLD_KERNEL(32, 4096)
INFOLD_KERNEL(64, 4096)
INFOLD_KERNEL(128, 4096)
#undef INFOLD_KERNEL

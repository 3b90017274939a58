// The block-circulant product of few rows: a block computes one block of one row of y, and for that transforms the
// whole row of x. Spectra are read as they are stored, and are on their way while x is transformed.
#include "fourier.cuh"
#include "fragment.cuh"
#include "log8.cuh"
#include "values.cuh"

namespace {

using namespace infold;

constexpr int kThreads = 256;
// Spectra of a thread that are on their way while x is transformed.
constexpr int kAhead = 8;

// A number's bits: what they are is said where they are used, so that no load waits for another.
__device__ uint32_t load_bits(const void* values, size_t index, int dtype) {
  return dtype == INFOLD_F32 ? static_cast<const uint32_t*>(values)[index]
                             : static_cast<const uint16_t*>(values)[index];
}
__device__ float value_of(uint32_t bits, int dtype) {
  return dtype == INFOLD_LOG8 ? float_of(bits) : load_value(&bits, 0, dtype);
}

struct Bits {
  uint32_t re, im;
};

template <int N>
struct Few {
  using Plan = fourier::Plan<N>;
  // Numbers of a packed spectrum that make one: frequency 0 and N/2, or a frequency's real and imaginary parts.
  static constexpr int kSlots = N / 2;
  // Inputs of which a thread multiplies every kParts-th.
  static constexpr int kParts = kThreads / kSlots;
  // Pairs of blocks that are transformed at a time.
  static constexpr int kTransforms = kThreads / Plan::kLanes;

  const InfoldCirculant& p;
  const int output = blockIdx.x % p.outputs, row = blockIdx.x / p.outputs;
  const int slot = threadIdx.x % kSlots, part = threadIdx.x / kSlots;

  __device__ Bits load_spectrum(int input) const {
    if (input >= p.inputs) return {0, 0};
    const size_t block = static_cast<size_t>(output) * p.output_stride + static_cast<size_t>(input) * p.input_stride;
    const size_t first = block * N + slot;
    if (p.spectrum_dtype == INFOLD_LOG8)
      return {bits_of(log8::load(p.log8, first)), bits_of(log8::load(p.log8, first + kSlots))};
    return {load_bits(p.spectrum, first, p.spectrum_dtype), load_bits(p.spectrum, first + kSlots, p.spectrum_dtype)};
  }

  __device__ uint32_t load_input(int col) const {
    return col < p.in_features ? load_bits(p.x, static_cast<size_t>(row) * p.in_features + col, p.dtype) : 0;
  }

  // A lane's numbers of two blocks of x.
  struct Column {
    Bits rows[Plan::kFirst];
  };

  __device__ Column load_column(int pair) const {
    Column result;
#pragma unroll
    for (int i = 0; i < Plan::kFirst; ++i) {
      const int col = 2 * pair * N + i * Plan::kLanes + threadIdx.x % Plan::kLanes;
      result.rows[i] = {load_input(col), load_input(col + N)};
    }
    return result;
  }

  // The spectra of x's blocks, of which two at a time are the parts of one complex block.
  __device__ void transform_inputs(Column bits, const Complex (&roots)[N], Complex* scratch, Complex* spectra) const {
    const int lane = threadIdx.x % Plan::kLanes, pairs = (p.inputs + 1) / 2;
    Complex* own = scratch + threadIdx.x / Plan::kLanes * Plan::kScratch;
    for (int first = 0; first < pairs; first += kTransforms) {
      const int pair = first + threadIdx.x / Plan::kLanes;
      if (first > 0) bits = load_column(pair);
      Complex column[Plan::kFirst];
#pragma unroll
      for (int i = 0; i < Plan::kFirst; ++i) {
        column[i] = {value_of(bits.rows[i].re, p.dtype), value_of(bits.rows[i].im, p.dtype)};
      }
      Plan::run(column, roots, own);
      if (pair < pairs) {
        Complex* out = spectra + 2 * pair * kSlots;
        for (int k = lane; k < kSlots; k += Plan::kLanes) {
          const Complex a = own[k], b = own[k == 0 ? kSlots : N - k];
          out[k] = k == 0 ? Complex{a.re, b.re} : Complex{(a.re + b.re) / 2, (a.im - b.im) / 2};
          out[k + kSlots] = k == 0 ? Complex{a.im, b.im} : Complex{(a.im + b.im) / 2, (b.re - a.re) / 2};
        }
      }
      // Before the scratch is used again.
      sync_warp();
    }
  }

  __device__ void multiply_add(Complex& sum, Bits bits, Complex x) const {
    const Complex w = {value_of(bits.re, p.spectrum_dtype), value_of(bits.im, p.spectrum_dtype)};
    const Complex product = slot == 0 ? Complex{w.re * x.re, w.im * x.im} : (p.conjugate ? conjugate(w) : w) * x;
    sum = sum + product;
  }

  // Makes y of the spectrum's sums, which are in the scratch as those of a transform.
  __device__ void finish(const Complex (&roots)[N], Complex* scratch) const {
    // The first warp, whose other lanes do what nobody reads.
    if (threadIdx.x < kLanes) {
      const int lane = threadIdx.x % Plan::kLanes;
      Complex column[Plan::kFirst];
#pragma unroll
      for (int i = 0; i < Plan::kFirst; ++i) column[i] = scratch[i * Plan::kLanes + lane];
      sync_warp();
      Plan::run(column, roots, scratch + threadIdx.x / Plan::kLanes * Plan::kScratch);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < N && output * N + i < p.out_features; i += kThreads) {
      const int col = output * N + i;
      const float bias = p.bias != nullptr ? load_value(p.bias, col, p.dtype) : 0;
      store_value(p.y, static_cast<size_t>(row) * p.out_features + col, p.dtype, scratch[i].re + bias);
    }
  }

  __device__ void run() const {
    __shared__ Complex roots[N];
    __shared__ Complex shares[kThreads];
    Complex* scratch = reinterpret_cast<Complex*>(dynamic_shared());
    Complex* spectra = scratch + kTransforms * Plan::kScratch;
    const Column first = load_column(threadIdx.x / Plan::kLanes);
    Bits ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ahead[i] = load_spectrum(part + i * kParts);
    Plan::fill(roots);
    __syncthreads();
    transform_inputs(first, roots, scratch, spectra);
    __syncthreads();

    Complex sum = {0, 0};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int input = part + i * kParts;
      if (input < p.inputs) multiply_add(sum, ahead[i], spectra[input * kSlots + slot]);
    }
    for (int input = part + kAhead * kParts; input < p.inputs; input += kParts) {
      multiply_add(sum, load_spectrum(input), spectra[input * kSlots + slot]);
    }
    shares[threadIdx.x] = sum;
    __syncthreads();
    if (part == 0) {
      for (int other = 1; other < kParts; ++other) sum = sum + shares[other * kSlots + slot];
      // A packed spectrum's numbers are those of an orthonormal transform, and times √2 where they stand for two.
      constexpr float kRoot = N == 16 ? 4 : N == 32 ? 5.65685425f : N == 64 ? 8 : N == 128 ? 11.3137085f : 16;
      constexpr float kScale = 0.70710678f / kRoot;
      // y is real, so that the conjugates' forward transform is the inverse.
      if (slot == 0) {
        scratch[0] = {sum.re / kRoot, 0};
        scratch[kSlots] = {sum.im / kRoot, 0};
      } else {
        scratch[slot] = {sum.re * kScale, -sum.im * kScale};
        scratch[N - slot] = {sum.re * kScale, sum.im * kScale};
      }
    }
    __syncthreads();
    finish(roots, scratch);
  }
};

}  // namespace

#define INFOLD_KERNEL(n)                                                                               \
  extern "C" __global__ void __launch_bounds__(kThreads) infold_circulant_few_##n(InfoldCirculant p) { \
    Few<n>{p}.run();                                                                                   \
  }
INFOLD_KERNEL(16)
INFOLD_KERNEL(32)
INFOLD_KERNEL(64)
INFOLD_KERNEL(128)
INFOLD_KERNEL(256)
#undef INFOLD_KERNEL

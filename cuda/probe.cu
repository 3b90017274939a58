// The smallest kernel: it proves that the build compiles and embeds device code for every architecture asked for.

// out[i] = i, for i below count.
extern "C" __global__ void infold_probe(unsigned* out, unsigned count) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) out[i] = i;
}

// Every kernel on the host, for the tests; and what Rust must agree with.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "circulant_many.cuh"
#include "decode.cuh"
#include "fourier.cuh"
#include "inputs.cuh"
#include "log8.cuh"
#include "narrow.cuh"
#include "pairs_layout.cuh"
#include "values.cuh"
#include "wide.cuh"

namespace in_backward {
#include "backward.cu"
}
namespace in_circulant_few {
#include "circulant_few.cu"
}
namespace in_circulant_many {
#include "circulant_many.cu"
}
namespace in_decode {
#include "decode.cu"
}
namespace in_lay_out {
#include "lay_out.cu"
}
namespace in_inputs {
#include "inputs.cu"
}
namespace in_linear {
#include "linear.cu"
}
namespace in_log8 {
#include "log8.cu"
}
namespace in_quantise {
#include "quantise.cu"
}
namespace in_unpack {
#include "unpack.cu"
}
namespace in_wide {
#include "wide.cu"
}

// Launches a kernel by its name; false where there is none.
extern "C" bool infold_emulate(const char* kernel, unsigned blocks, unsigned threads, unsigned shared,
                               const void* parameters) {
  using infold::emulation::launch;
#define INFOLD_KERNEL(file, parameters, name) {#name, launch<parameters, in_##file::name>}
#define INFOLD_KERNELS(layout)                                              \
  INFOLD_KERNEL(linear, InfoldLinear, infold_linear_##layout##_8),          \
      INFOLD_KERNEL(linear, InfoldLinear, infold_linear_##layout##_16),     \
      INFOLD_KERNEL(linear, InfoldLinear, infold_linear_##layout##_32),     \
      INFOLD_KERNEL(linear, InfoldLinear, infold_linear_##layout##_64),     \
      INFOLD_KERNEL(wide, InfoldWide, infold_wide_##layout##_64),           \
      INFOLD_KERNEL(wide, InfoldWide, infold_wide_##layout##_128),          \
      INFOLD_KERNEL(wide, InfoldWide, infold_finish_##layout),              \
      INFOLD_KERNEL(backward, InfoldWide, infold_backward_##layout##_64),   \
      INFOLD_KERNEL(backward, InfoldWide, infold_backward_##layout##_128),  \
      INFOLD_KERNEL(backward, InfoldWide, infold_backward_finish_##layout), \
      INFOLD_KERNEL(lay_out, InfoldLayOut, infold_tiles_##layout),          \
      INFOLD_KERNEL(unpack, InfoldUnpack, infold_unpack_##layout)
  constexpr struct {
    const char* name;
    void (*launch)(unsigned, unsigned, unsigned, const void*);
  } kKernels[] = {
      INFOLD_KERNEL(circulant_few, InfoldCirculant, infold_circulant_few_16),
      INFOLD_KERNEL(circulant_few, InfoldCirculant, infold_circulant_few_32),
      INFOLD_KERNEL(circulant_few, InfoldCirculant, infold_circulant_few_64),
      INFOLD_KERNEL(circulant_few, InfoldCirculant, infold_circulant_few_128),
      INFOLD_KERNEL(circulant_few, InfoldCirculant, infold_circulant_few_256),
      INFOLD_KERNEL(circulant_many, InfoldCirculant, infold_circulant_tiles),
      INFOLD_KERNEL(circulant_many, InfoldCirculant, infold_circulant_many_32_1024),
      INFOLD_KERNEL(circulant_many, InfoldCirculant, infold_circulant_many_64_1024),
      INFOLD_KERNEL(circulant_many, InfoldCirculant, infold_circulant_many_128_1024),
      INFOLD_KERNEL(circulant_many, InfoldCirculant, infold_circulant_many_32_4096),
      INFOLD_KERNEL(circulant_many, InfoldCirculant, infold_circulant_many_64_4096),
      INFOLD_KERNEL(circulant_many, InfoldCirculant, infold_circulant_many_128_4096),
      INFOLD_KERNEL(log8, InfoldLog8Decode, infold_log8_decode),
      INFOLD_KERNEL(inputs, InfoldInputs, infold_inputs_rows),
      INFOLD_KERNEL(inputs, InfoldInputs, infold_inputs_tiles),
      INFOLD_KERNELS(window),
      INFOLD_KERNELS(codes4),
      INFOLD_KERNELS(codes5),
      INFOLD_KERNELS(codes8),
      INFOLD_KERNEL(linear, InfoldLinear, infold_linear_pairs_8),
      INFOLD_KERNEL(linear, InfoldLinear, infold_linear_pairs_16),
      INFOLD_KERNEL(linear, InfoldLinear, infold_linear_pairs_of_levels_8),
      INFOLD_KERNEL(linear, InfoldLinear, infold_linear_pairs_of_levels_16),
      INFOLD_KERNEL(unpack, InfoldUnpack, infold_unpack_pairs),
      INFOLD_KERNEL(unpack, InfoldUnpack, infold_unpack_pairs_of_levels),
      INFOLD_KERNEL(decode, InfoldDecode, infold_decode_plain_bf16),
      INFOLD_KERNEL(decode, InfoldDecode, infold_decode_rans_bf16),
      INFOLD_KERNEL(decode, InfoldDecode, infold_decode_alias_bf16),
      INFOLD_KERNEL(decode, InfoldDecode, infold_decode_plain_levels),
      INFOLD_KERNEL(decode, InfoldDecode, infold_decode_rans_levels),
      INFOLD_KERNEL(decode, InfoldDecode, infold_decode_alias_levels),
      INFOLD_KERNEL(lay_out, InfoldHistogram, infold_histogram_bf16),
      INFOLD_KERNEL(lay_out, InfoldHistogram, infold_histogram_levels),
      INFOLD_KERNEL(lay_out, InfoldLayOut, infold_apart_bf16),
      INFOLD_KERNEL(lay_out, InfoldLayOut, infold_apart_levels),
      INFOLD_KERNEL(quantise, InfoldQuantise, infold_largest_f32),
      INFOLD_KERNEL(quantise, InfoldQuantise, infold_largest_bf16),
      INFOLD_KERNEL(quantise, InfoldQuantise, infold_quantise_f32),
      INFOLD_KERNEL(quantise, InfoldQuantise, infold_quantise_bf16),
      INFOLD_KERNEL(quantise, InfoldMeasure, infold_square_f32),
      INFOLD_KERNEL(quantise, InfoldMeasure, infold_square_bf16),
      INFOLD_KERNEL(quantise, InfoldMeasure, infold_measure_f32),
      INFOLD_KERNEL(quantise, InfoldMeasure, infold_measure_bf16),
  };
#undef INFOLD_KERNELS
#undef INFOLD_KERNEL
  for (const auto& entry : kKernels) {
    if (std::strcmp(kernel, entry.name) == 0) return entry.launch(blocks, threads, shared, parameters), true;
  }
  return false;
}

// Dynamic shared memory of a block of the fused product by pairs.
extern "C" uint32_t infold_pairs_shared_bytes() { return in_linear::Pairs::kSharedBytes; }

// Sizes of the parameters, and of what they are made of.
extern "C" void infold_parameter_sizes(size_t (&sizes)[7]) {
  sizes[0] = sizeof(InfoldEscape);
  sizes[1] = sizeof(InfoldHead);
  sizes[2] = sizeof(InfoldWeight);
  sizes[3] = sizeof(InfoldLinear);
  sizes[4] = sizeof(InfoldUnpack);
  sizes[5] = sizeof(InfoldInputs);
  sizes[6] = sizeof(InfoldWide);
}

// Fills parameters with a number for each field, so that fields that change places are seen.
extern "C" void infold_parameter_fields(InfoldLinear* linear, InfoldUnpack* unpack, InfoldInputs* inputs,
                                        InfoldWide* wide) {
  const auto pointer = [](auto& field, uintptr_t number) {
    field = reinterpret_cast<std::remove_reference_t<decltype(field)>>(number);
  };
  InfoldWeight& w = linear->weight;
  pointer(w.head, 1);
  pointer(w.values, 2);
  pointer(w.tiles, 3);
  pointer(w.escape_starts, 4);
  pointer(w.escapes, 5);
  pointer(w.scales, 6);
  w.scales_are_bf16 = 7;
  w.scale_stride = 8;
  w.rows = 9;
  w.cols = 10;
  w.payload_bytes = 14;
  pointer(linear->x, 11);
  pointer(linear->bias, 12);
  pointer(linear->y, 13);
  linear->dtype = INFOLD_F16;
  linear->batch = 14;
  linear->parts = 15;
  unpack->weight = w;
  pointer(unpack->indices, 11);
  pointer(unpack->out, 12);
  unpack->dtype = INFOLD_F32;
  pointer(inputs->x, 11);
  pointer(inputs->out, 12);
  inputs->dtype = INFOLD_F32;
  inputs->batch = 13;
  inputs->cols = 14;
  inputs->parts = 15;
  inputs->columns = 16;
  inputs->order = 1;
  wide->weight = w;
  pointer(wide->x, 11);
  pointer(wide->sums, 12);
  pointer(wide->bias, 13);
  pointer(wide->y, 14);
  wide->dtype = INFOLD_F32;
  wide->batch = 15;
  wide->parts = 16;
  wide->columns = 17;
  wide->splits = 18;
  wide->first_row = 19;
  wide->row_count = 20;
}

// The same for the block-circulant product.
extern "C" size_t infold_circulant_fields(InfoldCirculant* p) {
  p->log8 = {reinterpret_cast<const uint8_t*>(17), reinterpret_cast<const uint16_t*>(18),
             reinterpret_cast<const float*>(19)};
  p->x = reinterpret_cast<const void*>(1);
  p->spectrum = reinterpret_cast<const void*>(2);
  p->bias = reinterpret_cast<const void*>(3);
  p->y = reinterpret_cast<void*>(4);
  p->tiles = reinterpret_cast<uint32_t*>(5);
  p->dtype = INFOLD_F16;
  p->spectrum_dtype = INFOLD_F32;
  p->batch = 6;
  p->in_features = 7;
  p->out_features = 8;
  p->n = 9;
  p->inputs = 10;
  p->outputs = 11;
  p->input_stride = 12;
  p->output_stride = 13;
  p->conjugate = 14;
  p->input_steps = 15;
  p->outputs_each = 16;
  return sizeof *p;
}

// The same for log8.
extern "C" size_t infold_log8_fields(InfoldLog8Decode* p) {
  p->numbers = {reinterpret_cast<const uint8_t*>(1), reinterpret_cast<const uint16_t*>(2),
                reinterpret_cast<const float*>(3)};
  p->out = reinterpret_cast<void*>(4);
  p->count = 5;
  p->dtype = INFOLD_F16;
  return sizeof *p;
}

// The shared memory that its kernels need: of few rows for so many blocks of x, and of many for so many features.
extern "C" size_t infold_circulant_few_shared(int n, int inputs) {
  const auto of = [&](auto plan) {
    using Plan = decltype(plan);
    return (256 / Plan::kLanes * Plan::kScratch + (inputs + inputs % 2) * (n / 2)) * sizeof(infold::Complex);
  };
  using infold::fourier::Plan;
  return n == 16    ? of(Plan<16>{})
         : n == 32  ? of(Plan<32>{})
         : n == 64  ? of(Plan<64>{})
         : n == 128 ? of(Plan<128>{})
                    : of(Plan<256>{});
}
extern "C" size_t infold_circulant_many_shared(int n, int features) {
  using infold::circulant::Shape;
  const bool few = features == 1024;
  return 4 * (n == 32   ? (few ? Shape<32, 1024>::kSharedWords : Shape<32, 4096>::kSharedWords)
              : n == 64 ? (few ? Shape<64, 1024>::kSharedWords : Shape<64, 4096>::kSharedWords)
                        : (few ? Shape<128, 1024>::kSharedWords : Shape<128, 4096>::kSharedWords));
}

// The same for what lays weights out.
extern "C" void infold_lay_out_sizes(size_t (&sizes)[6]) {
  sizes[0] = sizeof(InfoldPlane);
  sizes[1] = sizeof(InfoldDecode);
  sizes[2] = sizeof(InfoldHistogram);
  sizes[3] = sizeof(InfoldLayOut);
  sizes[4] = sizeof(InfoldQuantise);
  sizes[5] = sizeof(InfoldMeasure);
}

extern "C" void infold_lay_out_fields(InfoldDecode* decode, InfoldHistogram* histogram, InfoldLayOut* lay_out,
                                      InfoldQuantise* quantise, InfoldMeasure* measure) {
  const auto pointer = [](auto& field, uintptr_t number) {
    field = reinterpret_cast<std::remove_reference_t<decltype(field)>>(number);
  };
  pointer(decode->payload, 1);
  decode->payload_bytes = 2;
  pointer(decode->directory, 3);
  pointer(decode->slots, 4);
  pointer(decode->codes, 5);
  pointer(decode->damage, 6);
  decode->before = {7, 8, 9, 10, 11};
  decode->own = {12, 13, 14, 15, 16};
  decode->plane = 17;
  decode->workers = 18;
  decode->low_bits = 19;
  decode->tile_rows = 20;
  decode->rows = 21;
  decode->cols = 22;
  pointer(histogram->codes, 1);
  histogram->count = 2;
  pointer(histogram->counts, 3);
  pointer(lay_out->codes, 1);
  lay_out->rows = 2;
  lay_out->cols = 3;
  lay_out->lo = 4;
  lay_out->values = 5;
  pointer(lay_out->tiles, 6);
  pointer(lay_out->row_counts, 7);
  pointer(lay_out->escape_starts, 8);
  pointer(lay_out->escapes, 9);
  pointer(lay_out->centroids, 10);
  lay_out->first_centroid = 11;
  lay_out->centroid_count = 12;
  pointer(quantise->weights, 1);
  pointer(quantise->largest, 2);
  pointer(quantise->scales, 3);
  pointer(quantise->levels, 4);
  quantise->rows = 5;
  quantise->cols = 6;
  quantise->group_cols = 7;
  quantise->max = 8;
  pointer(measure->weights, 1);
  pointer(measure->scales, 2);
  pointer(measure->squares, 3);
  pointer(measure->counts, 4);
  pointer(measure->level_weights, 5);
  pointer(measure->moments, 6);
  pointer(measure->distortions, 7);
  measure->rows = 8;
  measure->cols = 9;
  measure->every = 10;
  measure->max = 11;
}

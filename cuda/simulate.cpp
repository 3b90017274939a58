// Every kernel on the host, for the tests; and what Rust must agree with.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "decode.cuh"
#include "layouts.cuh"

namespace decode {
#include "decode.cu"
}
namespace lay_out {
#include "lay_out.cu"
}
namespace linear {
#include "linear.cu"
}
namespace quantise {
#include "quantise.cu"
}
namespace unpack {
#include "unpack.cu"
}

// Launches a kernel by its name; false where there is none.
extern "C" bool infold_emulate(const char* kernel, unsigned blocks, unsigned threads, const void* parameters) {
  using infold::emulation::launch;
  constexpr struct {
    const char* name;
    void (*launch)(unsigned, unsigned, const void*);
  } kKernels[] = {
      {"infold_linear_window_8", launch<InfoldLinear, linear::infold_linear_window_8>},
      {"infold_linear_window_16", launch<InfoldLinear, linear::infold_linear_window_16>},
      {"infold_linear_codes4_8", launch<InfoldLinear, linear::infold_linear_codes4_8>},
      {"infold_linear_codes4_16", launch<InfoldLinear, linear::infold_linear_codes4_16>},
      {"infold_linear_codes5_8", launch<InfoldLinear, linear::infold_linear_codes5_8>},
      {"infold_linear_codes5_16", launch<InfoldLinear, linear::infold_linear_codes5_16>},
      {"infold_linear_codes8_8", launch<InfoldLinear, linear::infold_linear_codes8_8>},
      {"infold_linear_codes8_16", launch<InfoldLinear, linear::infold_linear_codes8_16>},
      {"infold_unpack_window", launch<InfoldUnpack, unpack::infold_unpack_window>},
      {"infold_unpack_codes4", launch<InfoldUnpack, unpack::infold_unpack_codes4>},
      {"infold_unpack_codes5", launch<InfoldUnpack, unpack::infold_unpack_codes5>},
      {"infold_unpack_codes8", launch<InfoldUnpack, unpack::infold_unpack_codes8>},
      {"infold_decode_plain_bf16", launch<InfoldDecode, decode::infold_decode_plain_bf16>},
      {"infold_decode_rans_bf16", launch<InfoldDecode, decode::infold_decode_rans_bf16>},
      {"infold_decode_alias_bf16", launch<InfoldDecode, decode::infold_decode_alias_bf16>},
      {"infold_decode_plain_levels", launch<InfoldDecode, decode::infold_decode_plain_levels>},
      {"infold_decode_rans_levels", launch<InfoldDecode, decode::infold_decode_rans_levels>},
      {"infold_decode_alias_levels", launch<InfoldDecode, decode::infold_decode_alias_levels>},
      {"infold_histogram_bf16", launch<InfoldHistogram, lay_out::infold_histogram_bf16>},
      {"infold_histogram_levels", launch<InfoldHistogram, lay_out::infold_histogram_levels>},
      {"infold_apart_bf16", launch<InfoldLayOut, lay_out::infold_apart_bf16>},
      {"infold_apart_levels", launch<InfoldLayOut, lay_out::infold_apart_levels>},
      {"infold_tiles_window", launch<InfoldLayOut, lay_out::infold_tiles_window>},
      {"infold_tiles_codes4", launch<InfoldLayOut, lay_out::infold_tiles_codes4>},
      {"infold_tiles_codes5", launch<InfoldLayOut, lay_out::infold_tiles_codes5>},
      {"infold_tiles_codes8", launch<InfoldLayOut, lay_out::infold_tiles_codes8>},
      {"infold_largest_f32", launch<InfoldQuantise, quantise::infold_largest_f32>},
      {"infold_largest_bf16", launch<InfoldQuantise, quantise::infold_largest_bf16>},
      {"infold_quantise_f32", launch<InfoldQuantise, quantise::infold_quantise_f32>},
      {"infold_quantise_bf16", launch<InfoldQuantise, quantise::infold_quantise_bf16>},
  };
  for (const auto& entry : kKernels) {
    if (std::strcmp(kernel, entry.name) == 0) return entry.launch(blocks, threads, parameters), true;
  }
  return false;
}

// Sizes of the parameters, and of what they are made of.
extern "C" void infold_parameter_sizes(size_t (&sizes)[5]) {
  sizes[0] = sizeof(InfoldEscape);
  sizes[1] = sizeof(InfoldHead);
  sizes[2] = sizeof(InfoldWeight);
  sizes[3] = sizeof(InfoldLinear);
  sizes[4] = sizeof(InfoldUnpack);
}

// Fills parameters with a number for each field, so that fields that change places are seen.
extern "C" void infold_parameter_fields(InfoldLinear* linear, InfoldUnpack* unpack) {
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
  pointer(linear->x, 11);
  pointer(linear->bias, 12);
  pointer(linear->y, 13);
  linear->batch = 14;
  unpack->weight = w;
  pointer(unpack->indices, 11);
  pointer(unpack->out, 12);
  unpack->out_is_bf16 = 13;
}

// The same for what lays weights out.
extern "C" void infold_lay_out_sizes(size_t (&sizes)[5]) {
  sizes[0] = sizeof(InfoldPlane);
  sizes[1] = sizeof(InfoldDecode);
  sizes[2] = sizeof(InfoldHistogram);
  sizes[3] = sizeof(InfoldLayOut);
  sizes[4] = sizeof(InfoldQuantise);
}

extern "C" void infold_lay_out_fields(InfoldDecode* decode, InfoldHistogram* histogram, InfoldLayOut* lay_out,
                                      InfoldQuantise* quantise) {
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
}

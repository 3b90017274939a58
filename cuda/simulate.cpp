// Every kernel on the host, for the tests; and what Rust must agree with.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "pairs_layout.cuh"

namespace linear {
#include "linear.cu"
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
      {"infold_linear_pairs_8", launch<InfoldLinear, linear::infold_linear_pairs_8>},
      {"infold_linear_pairs_16", launch<InfoldLinear, linear::infold_linear_pairs_16>},
      {"infold_linear_pairs_of_levels_8", launch<InfoldLinear, linear::infold_linear_pairs_of_levels_8>},
      {"infold_linear_pairs_of_levels_16", launch<InfoldLinear, linear::infold_linear_pairs_of_levels_16>},
      {"infold_unpack_window", launch<InfoldUnpack, unpack::infold_unpack_window>},
      {"infold_unpack_codes4", launch<InfoldUnpack, unpack::infold_unpack_codes4>},
      {"infold_unpack_codes5", launch<InfoldUnpack, unpack::infold_unpack_codes5>},
      {"infold_unpack_codes8", launch<InfoldUnpack, unpack::infold_unpack_codes8>},
      {"infold_unpack_pairs", launch<InfoldUnpack, unpack::infold_unpack_pairs>},
      {"infold_unpack_pairs_of_levels", launch<InfoldUnpack, unpack::infold_unpack_pairs_of_levels>},
  };
  for (const auto& entry : kKernels) {
    if (std::strcmp(kernel, entry.name) == 0) return entry.launch(blocks, threads, parameters), true;
  }
  return false;
}

// Dynamic shared memory of a block of the fused product by pairs.
extern "C" uint32_t infold_pairs_shared_bytes() { return linear::Pairs::kSharedBytes; }

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
  w.payload_bytes = 14;
  pointer(linear->x, 11);
  pointer(linear->bias, 12);
  pointer(linear->y, 13);
  linear->batch = 14;
  unpack->weight = w;
  pointer(unpack->indices, 11);
  pointer(unpack->out, 12);
  unpack->out_is_bf16 = 13;
}

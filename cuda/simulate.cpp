// Every kernel on the host, for the tests; and what Rust must agree with.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "params.h"
#include "window_tile.cuh"

namespace linear {
#include "linear_window.cu"
}
namespace unpack {
#include "unpack_window.cu"
}

// Launches a kernel by its name; false where there is none.
extern "C" bool infold_emulate(const char* kernel, unsigned blocks, unsigned threads, const void* parameters) {
  using infold::emulation::launch;
  constexpr struct {
    const char* name;
    void (*launch)(unsigned, unsigned, const void*);
  } kKernels[] = {
      {"infold_linear_window_8", launch<InfoldWindowLinear, linear::infold_linear_window_8>},
      {"infold_linear_window_16", launch<InfoldWindowLinear, linear::infold_linear_window_16>},
      {"infold_unpack_window", launch<InfoldWindowUnpack, unpack::infold_unpack_window>},
      {"infold_embedding_window", launch<InfoldWindowEmbedding, unpack::infold_embedding_window>},
  };
  for (const auto& entry : kKernels) {
    if (std::strcmp(kernel, entry.name) == 0) return entry.launch(blocks, threads, parameters), true;
  }
  return false;
}

// Sizes of the parameters, and of what they are made of.
extern "C" void infold_parameter_sizes(size_t (&sizes)[5]) {
  sizes[0] = sizeof(InfoldEscape);
  sizes[1] = sizeof(InfoldWindowWeight);
  sizes[2] = sizeof(InfoldWindowLinear);
  sizes[3] = sizeof(InfoldWindowUnpack);
  sizes[4] = sizeof(InfoldWindowEmbedding);
}

// Fills parameters with a number for each field, so that fields that change places are seen.
extern "C" void infold_parameter_fields(InfoldWindowLinear* linear, InfoldWindowUnpack* unpack,
                                        InfoldWindowEmbedding* embedding) {
  const auto pointer = [](auto& field, uintptr_t number) {
    field = reinterpret_cast<std::remove_reference_t<decltype(field)>>(number);
  };
  const auto weight = [&](InfoldWindowWeight& w) {
    pointer(w.base, 1);
    pointer(w.tiles, 2);
    pointer(w.escape_starts, 3);
    pointer(w.escapes, 4);
    w.rows = 5;
    w.cols = 6;
  };
  weight(linear->weight);
  pointer(linear->x, 7);
  pointer(linear->bias, 8);
  pointer(linear->y, 9);
  linear->batch = 10;
  weight(unpack->weight);
  pointer(unpack->out, 7);
  weight(embedding->weight);
  pointer(embedding->indices, 7);
  pointer(embedding->out, 8);
}

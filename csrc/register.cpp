// Every schema of the library, in one place. `docs/operators.md` describes them.

#include <torch/library.h>

#include <string>

#include "infold/src/bridge.rs.h"

TORCH_LIBRARY(infold, m) {
  const std::vector<at::Tag> compute = {at::Tag::pt2_compliant_tag};
  // Compute: functional, differentiable, shapes known from integers alone.
  m.def(
      "fused_linear(Tensor x, Tensor payload, Tensor directory, Tensor tables, Tensor? scales, Tensor? bias, int "
      "codec, "
      "int layout, int out_features, int in_features, ScalarType weight_dtype, bool exact=False) -> Tensor",
      compute);
  m.def(
      "fused_linear_dx(Tensor gradient, Tensor payload, Tensor directory, Tensor tables, Tensor? scales, int codec, "
      "int layout, int out_features, int in_features, ScalarType weight_dtype, bool exact=False) -> Tensor",
      compute);
  m.def(
      "fused_linear_ds(Tensor gradient, Tensor x, Tensor payload, Tensor directory, Tensor tables, int[] scale_shape, "
      "int codec, int layout, int out_features, int in_features, ScalarType weight_dtype) -> Tensor",
      compute);
  m.def(
      "fused_embedding(Tensor indices, Tensor payload, Tensor directory, Tensor tables, Tensor? scales, int codec, "
      "int layout, int num_embeddings, int embedding_dim, ScalarType weight_dtype) -> Tensor",
      compute);
  m.def(
      "fused_embedding_ds(Tensor gradient, Tensor indices, Tensor payload, Tensor directory, Tensor tables, "
      "int[] scale_shape, int codec, int layout, int num_embeddings, int embedding_dim, ScalarType weight_dtype) -> "
      "Tensor",
      compute);
  m.def(
      "fused_conv(Tensor x, Tensor payload, Tensor directory, Tensor tables, Tensor? scales, Tensor? bias, "
      "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, int codec, int layout, int "
      "out_features, int in_features, ScalarType weight_dtype, bool exact=False) -> Tensor",
      compute);
  m.def(
      "unpack(Tensor payload, Tensor directory, Tensor tables, Tensor? scales, int codec, int layout, int "
      "out_features, "
      "int in_features, ScalarType weight_dtype) -> Tensor",
      compute);
  m.def("frequency_linear(Tensor x, Tensor spectrum, Tensor? bias, int out_features) -> Tensor", compute);
  m.def("frequency_linear_dx(Tensor gradient, Tensor spectrum, int in_features) -> Tensor", compute);
  m.def("frequency_linear_dw(Tensor gradient, Tensor x, int block) -> Tensor", compute);
  m.def("frequency_linear_complex(Tensor x, Tensor spectrum, Tensor? bias, int block, int out_features) -> Tensor",
        compute);
  m.def(
      "sparse_frequency_linear(Tensor x, Tensor coefficients, Tensor indices, Tensor? bias, int out_features, float "
      "scale) -> Tensor",
      compute);
  m.def(
      "sparse_frequency_linear_dx(Tensor gradient, Tensor coefficients, Tensor indices, int in_features, float scale) "
      "-> Tensor",
      compute);
  m.def("sparse_frequency_linear_dc(Tensor gradient, Tensor x, Tensor indices, float scale) -> Tensor", compute);
  m.def(
      "frequency_conv(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, "
      "bool circular) -> Tensor",
      compute);
  m.def(
      "frequency_conv_dx(Tensor gradient, Tensor weight, SymInt[] x_size, int[] stride, int[] padding, int[] dilation, "
      "int groups, bool circular) -> Tensor",
      compute);
  m.def(
      "frequency_conv_dw(Tensor gradient, Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "int groups, bool circular) -> Tensor",
      compute);
  m.def("frequency_linear_log8(Tensor x, Tensor codes, Tensor words, Tensor? bias, int out_features) -> Tensor",
        compute);
  m.def("log8_decode(Tensor codes, Tensor words, ScalarType dtype) -> Tensor", compute);
  m.def("pca_project(Tensor x, Tensor components, Tensor? mean=None, Tensor? scale=None) -> Tensor", compute);
  m.def("pca_reconstruct(Tensor z, Tensor components, Tensor? mean=None, Tensor? scale=None) -> Tensor", compute);
  m.def("pca_scatter(Tensor x, Tensor shift) -> (Tensor, Tensor)");
  m.def("bspline_basis(Tensor points, Tensor knots, int derivative=0) -> Tensor", compute);
  m.def("bspline_fit_matrix(Tensor points, Tensor knots) -> Tensor", compute);
  m.def("bspline_control(Tensor values, Tensor matrix) -> Tensor", compute);
  m.def("bspline_eval(Tensor control, Tensor knots, Tensor points, int derivative=0) -> Tensor", compute);
  m.def("bspline_fit(Tensor values, Tensor knots, Tensor points) -> Tensor", compute);
  // Encode. Results are (codes, words), of sizes that x's shape gives.
  m.def("log8_encode(Tensor x) -> (Tensor, Tensor)");
  // Encode: sizes depend on the data. Results are (payload, directory, tables, scales).
  m.def("pack_lossless(Tensor weight) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("pack_ecsq(Tensor weight, float? bits=None, float? max_error=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("pack_int8(Tensor weight) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("pack_int4(Tensor weight, int group_size=128) -> (Tensor, Tensor, Tensor, Tensor)");
  // The same weight in layout 0 (compact), 1 (fast), or for CUDA 2 (the one of fixed width that it has
  // there, or else pairs, or else as it is), 3 to 5 (of fixed width), 6 and 7 (pairs) or 8 to 10 (as it is), exactly:
  // (payload, directory, tables).
  m.def("lay_out(Tensor payload, Tensor directory, Tensor tables, int layout) -> (Tensor, Tensor, Tensor)");
  // (version, codec, layout, ScalarType of the dense weight, out_features, in_features, quantizer, predictor, rows and
  // columns of the scales)
  m.def(
      "inspect_packed(Tensor payload, Tensor directory, Tensor tables, Tensor? scales=None, bool verify=False) -> "
      "int[]");
  // Effect: weights on disk and in borrowed memory. Stores and tickets are numbers; csrc/tier.cpp.
  m.def("tier_open(str folder, int nbytes, int depth=32, str backend=\"auto\") -> int");
  m.def("tier_reserve(int store, int nbytes) -> int");
  m.def("tier_read(int store, int offset, Tensor out) -> int");
  m.def("tier_write(int store, int offset, Tensor data) -> int");
  m.def("tier_wait(int store, int ticket) -> ()");
  m.def("tier_done(int store, int ticket) -> bool");
  m.def("tier_close(int store) -> ()");
  // (bytes read, bytes written, requests, those unfinished, 1 for io_uring, 1 for past the page cache)
  m.def("tier_stats(int store) -> int[]");
  m.def("tier_bind(Tensor tensor, Tensor? memory) -> ()");
  // Bytes that the library holds outside tensors, and the most since the last reset.
  m.def("allocated_bytes(bool reset_peak=False) -> int[]", [](bool reset_peak) {
    const auto bytes = infold::allocated_bytes(reset_peak);
    return std::vector<int64_t>(bytes.begin(), bytes.end());
  });
  m.def("build_info() -> str", [] { return std::string(infold::build_info()); });
}

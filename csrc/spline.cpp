// PCA's projection with its adjoint, and cubic B-splines.

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "infold/csrc/call.h"
#include "infold/csrc/dispatch.h"

namespace infold {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

using MapSignature = Tensor(const Tensor& x, const Tensor& components, const OptionalTensor& mean,
                            const OptionalTensor& scale);

struct ProjectOp {
  static constexpr const char* name = "infold::pca_project";
  using Signature = MapSignature;
};

struct ReconstructOp {
  static constexpr const char* name = "infold::pca_reconstruct";
  using Signature = MapSignature;
};

struct BasisOp {
  static constexpr const char* name = "infold::bspline_basis";
  using Signature = Tensor(const Tensor& points, const Tensor& knots, int64_t derivative);
};

struct FitMatrixOp {
  static constexpr const char* name = "infold::bspline_fit_matrix";
  using Signature = Tensor(const Tensor& points, const Tensor& knots);
};

struct ControlOp {
  static constexpr const char* name = "infold::bspline_control";
  using Signature = Tensor(const Tensor& values, const Tensor& matrix);
};

void check_components(const Tensor& components) {
  TORCH_CHECK_VALUE(components.dim() == 2, "components: expected shape [components, features], got ",
                    components.sym_sizes());
}

Tensor meta_map(const Tensor& x, const Tensor& components, int64_t from, const char* what) {
  check_components(components);
  const auto size = [&](int64_t dimension) { return components.sym_size(dimension).guard_int(__FILE__, __LINE__); };
  return x.new_empty_symint(with_last(x, size(from), size(1 - from), what),
                            x.options().dtype(components.scalar_type()));
}

Tensor meta_project(const Tensor& x, const Tensor& components, const OptionalTensor&, const OptionalTensor&) {
  return meta_map(x, components, 1, "x");
}

Tensor meta_reconstruct(const Tensor& z, const Tensor& components, const OptionalTensor&, const OptionalTensor&) {
  return meta_map(z, components, 0, "z");
}

Tensor project(const Tensor& x, const Tensor& components, const OptionalTensor& mean, const OptionalTensor& scale) {
  return run(x, [&](Outputs& out) { return pca_project(x, components, or_undefined(mean), or_undefined(scale), out); });
}

Tensor reconstruct(const Tensor& z, const Tensor& components, const OptionalTensor& mean, const OptionalTensor& scale) {
  return run(
      z, [&](Outputs& out) { return pca_reconstruct(z, components, or_undefined(mean), or_undefined(scale), out); });
}

std::tuple<Tensor, Tensor> meta_scatter(const Tensor& x, const Tensor& shift) {
  const c10::SymInt features = shift.sym_size(0);
  const auto options = x.options().dtype(at::kDouble);
  return {x.new_empty_symint({features, features}, options), x.new_empty_symint({features}, options)};
}

std::tuple<Tensor, Tensor> scatter(const Tensor& x, const Tensor& shift) {
  Outputs outputs;
  check(pca_scatter(x, shift, outputs));
  return {outputs.at(0), outputs.at(1)};
}

/// A gradient in the dtype of what it is of, or what else is combined with a tensor in its dtype.
Tensor as(const Tensor& tensor, const Tensor& of) { return tensor.to(of.scalar_type()); }

Tensor flat(const Tensor& tensor) { return tensor.reshape_symint({-1, tensor.sym_size(-1)}); }

Tensor scaled(const Tensor& tensor, const Tensor& scale) {
  return scale.defined() ? tensor * as(scale, tensor) : tensor;
}

/// y = ((x - m) V') s. All gradients are made of operators that have gradients. Tensors that are not there have no
/// index.
struct ProjectFunction : Function<ProjectFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& components, const OptionalTensor& mean,
                        const OptionalTensor& scale) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, components, or_undefined(mean), or_undefined(scale)});
    return op<ProjectOp>().call(x, components, mean, scale);
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &g = gradients[0], &x = saved[0], &components = saved[1], &mean = saved[2], &scale = saved[3];
    const OptionalTensor of_scale = scale.defined() ? OptionalTensor(scale) : std::nullopt;
    const OptionalTensor of_mean = mean.defined() ? OptionalTensor(mean) : std::nullopt;
    Tensor dx, dv, dm, ds;
    if (ctx->needs_input_grad(0)) dx = as(op<ReconstructOp>().call(g, components, std::nullopt, of_scale), x);
    if (ctx->needs_input_grad(1)) {
      const Tensor values = x.to(components.scalar_type());
      dv = flat(scaled(g, scale)).t().mm(flat(mean.defined() ? values - as(mean, values) : values));
    }
    if (mean.defined() && ctx->needs_input_grad(2))
      dm = as(op<ReconstructOp>().call(sum_rows(g), components, std::nullopt, of_scale).neg(), mean);
    if (scale.defined() && ctx->needs_input_grad(mean.defined() ? 3 : 2))
      ds = as(sum_rows(g * op<ProjectOp>().call(x, components, of_mean, std::nullopt)), scale);
    return {dx, dv, dm, ds};
  }
};

/// y = (z s) V + m.
struct ReconstructFunction : Function<ReconstructFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& z, const Tensor& components, const OptionalTensor& mean,
                        const OptionalTensor& scale) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({z, components, or_undefined(scale)});
    ctx->saved_data["has_mean"] = mean.has_value();
    ctx->saved_data["mean_dtype"] =
        static_cast<int64_t>(mean.has_value() ? mean->scalar_type() : components.scalar_type());
    return op<ReconstructOp>().call(z, components, mean, scale);
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &g = gradients[0], &z = saved[0], &components = saved[1], &scale = saved[2];
    const OptionalTensor of_scale = scale.defined() ? OptionalTensor(scale) : std::nullopt;
    const bool has_mean = ctx->saved_data["has_mean"].toBool();
    Tensor dz, dv, dm, ds;
    if (ctx->needs_input_grad(0)) dz = as(op<ProjectOp>().call(g, components, std::nullopt, of_scale), z);
    if (ctx->needs_input_grad(1)) dv = flat(scaled(z.to(components.scalar_type()), scale)).t().mm(flat(g));
    if (has_mean && ctx->needs_input_grad(2))
      dm = sum_rows(g).to(static_cast<at::ScalarType>(ctx->saved_data["mean_dtype"].toInt()));
    if (scale.defined() && ctx->needs_input_grad(has_mean ? 3 : 2))
      ds = as(sum_rows(z * op<ProjectOp>().call(g, components, std::nullopt, std::nullopt)), scale);
    return {dz, dv, dm, ds};
  }
};

int64_t control_points(const Tensor& knots) {
  TORCH_CHECK_VALUE(knots.dim() == 1 && knots.size(0) >= 8,
                    "knots: expected at least 8, four more than control points, got shape ", knots.sym_sizes());
  return knots.size(0) - 4;
}

Tensor meta_basis(const Tensor& points, const Tensor& knots, int64_t) {
  return points.new_empty_symint({points.sym_size(0), control_points(knots)}, points.options().dtype(at::kDouble));
}

Tensor meta_fit_matrix(const Tensor& points, const Tensor& knots) {
  return points.new_empty_symint({control_points(knots), points.sym_size(0)}, points.options().dtype(at::kDouble));
}

Tensor basis(const Tensor& points, const Tensor& knots, int64_t derivative) {
  return run(points, [&](Outputs& out) { return bspline_basis(points, knots, derivative, out); });
}

Tensor fit_matrix(const Tensor& points, const Tensor& knots) {
  return run(points, [&](Outputs& out) { return bspline_fit_matrix(points, knots, out); });
}

void check_floats(const Tensor& numbers, const char* what) {
  TORCH_CHECK_VALUE(at::isFloatingType(numbers.scalar_type()), what, ": expected a float tensor, got ",
                    numbers.scalar_type());
}

/// numbers · matrix', in the numbers' dtype. Half precision is too rough for sums of many terms.
Tensor times(const Tensor& numbers, const Tensor& matrix) {
  const Tensor wide = numbers.to(compute_dtype(numbers));
  return at::matmul(wide, matrix.to(wide.options()).t()).to(numbers.scalar_type());
}

Tensor meta_control(const Tensor& values, const Tensor& matrix) {
  check_floats(values, "values");
  TORCH_CHECK_VALUE(matrix.dim() == 2, "matrix: expected shape [control points, points], got ", matrix.sym_sizes());
  return values.new_empty_symint(with_last(values, matrix.size(1), matrix.size(0), "values"));
}

Tensor control(const Tensor& values, const Tensor& matrix) {
  return run(values, [&](Outputs& out) { return bspline_control(values, matrix, out); });
}

/// Linear in values, and differentiable in them alone: the matrix is of points and knots.
struct ControlFunction : Function<ControlFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& values, const Tensor& matrix) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({matrix});
    return op<ControlOp>().call(values, matrix);
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    return {times(gradients[0], ctx->get_saved_variables()[0].t()), Tensor()};
  }
};

Tensor eval(const Tensor& control, const Tensor& knots, const Tensor& points, int64_t derivative) {
  const int64_t count = control_points(knots);
  with_last(control, count, count, "control");
  check_floats(control, "control");
  return times(control, op<BasisOp>().call(points, knots, derivative));
}

Tensor fit(const Tensor& values, const Tensor& knots, const Tensor& points) {
  return op<ControlOp>().call(values, op<FitMatrixOp>().call(points, knots));
}

TORCH_LIBRARY_IMPL(infold, CPU, m) {
  m.impl("pca_project", project);
  m.impl("pca_reconstruct", reconstruct);
  m.impl("pca_scatter", scatter);
  m.impl("bspline_basis", basis);
  m.impl("bspline_fit_matrix", fit_matrix);
  m.impl("bspline_control", control);
}

// Places are looked at on the host: Rust says so where they are not there.
TORCH_LIBRARY_IMPL(infold, CUDA, m) {
  m.impl("pca_project", project);
  m.impl("pca_reconstruct", reconstruct);
  m.impl("bspline_basis", basis);
  m.impl("bspline_fit_matrix", fit_matrix);
  m.impl("bspline_control", control);
}

TORCH_LIBRARY_IMPL(infold, Meta, m) {
  m.impl("pca_project", meta_project);
  m.impl("pca_reconstruct", meta_reconstruct);
  m.impl("pca_scatter", meta_scatter);
  m.impl("bspline_basis", meta_basis);
  m.impl("bspline_fit_matrix", meta_fit_matrix);
  m.impl("bspline_control", meta_control);
}

TORCH_LIBRARY_IMPL(infold, Autograd, m) {
  m.impl("pca_project", Apply<ProjectFunction, MapSignature>::call);
  m.impl("pca_reconstruct", Apply<ReconstructFunction, MapSignature>::call);
  m.impl("bspline_control", Apply<ControlFunction, ControlOp::Signature>::call);
}

TORCH_LIBRARY_IMPL(infold, CompositeImplicitAutograd, m) {
  m.impl("bspline_eval", eval);
  m.impl("bspline_fit", fit);
}

}  // namespace
}  // namespace infold

// Sparse spectra on CUDA tensors, composed of PyTorch's operators: real transforms, a gather, a scatter. Nothing waits
// for the device, so that indices cannot be refused; those out of range are moved into it.

#include <ATen/ATen.h>
#include <torch/library.h>

#include "infold/csrc/call.h"
#include "infold/csrc/frequency.h"
#include "infold/csrc/sparse_frequency.h"

namespace infold {
namespace {

/// Where coefficients are in two real transforms, which have frequencies up to half their sizes, and which of them are
/// at a u beyond the half, as conjugates.
struct Places {
  Tensor u, v, beyond;
};

Places places(const Tensor& indices, int64_t out_features, int64_t in_features) {
  const Tensor u = indices.select(0, 0).to(at::kLong), v = indices.select(0, 1).to(at::kLong);
  return {at::minimum(u, out_features - u).clamp(0, out_features / 2), v.clamp(0, in_features / 2),
          u.mul(2).gt(out_features)};
}

Tensor conjugate_where(const Tensor& condition, const Tensor& values) {
  return at::where(condition.unsqueeze(1), values.conj(), values);
}

/// The spectra of rows at some frequencies: (frequencies, rows).
Tensor spectra_at(const Tensor& rows, const Tensor& frequencies) {
  const Tensor flat = rows.reshape({-1, rows.size(-1)}).to(compute_dtype(rows));
  return at::fft_rfft(flat).t().index_select(0, frequencies);
}

/// scale·Re Σ exp(2πi·f·j/n)·values_f of values (frequencies, rows), in the dtype and with the leading dimensions of
/// `like`.
Tensor synthesise(const Tensor& values, const Tensor& frequencies, int64_t n, double scale, const Tensor& like) {
  const auto count = n / 2 + 1;
  Tensor spectrum = at::zeros({count, values.size(1)}, values.options());
  // Sorts, and so adds in one order.
  spectrum.index_put_({frequencies}, values, /*accumulate=*/true);
  // A real transform counts pairs of conjugates twice. Of what is alone the imaginary part counts for nothing.
  Tensor real = at::full({count, 1}, 0.5 * scale, at::real(values).options());
  Tensor imaginary = real.clone();
  const auto alone = [&](int64_t at) {
    real.narrow(0, at, 1).fill_(scale);
    imaginary.narrow(0, at, 1).zero_();
  };
  alone(0);
  if (n % 2 == 0) alone(n / 2);
  spectrum = at::complex(at::real(spectrum) * real, at::imag(spectrum) * imaginary);
  const Tensor out = at::fft_irfft(spectrum.t(), n, 1, "forward");
  auto size = like.sizes().vec();
  size.back() = n;
  return out.reshape(size).to(like.scalar_type());
}

bool is_empty(const Tensor& tensor, int64_t features) { return tensor.numel() == 0 || features == 0; }

Tensor zeros(const Tensor& like, int64_t features) {
  auto size = like.sizes().vec();
  size.back() = features;
  return at::zeros(size, like.options());
}

Tensor linear(const Tensor& x, const Tensor& coefficients, const Tensor& indices, const OptionalTensor& bias,
              int64_t out_features, double scale) {
  check_indices(indices, scale);
  check_coefficients(coefficients, indices);
  check_count(out_features, "out_features");
  check_bias(bias, out_features);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  Tensor y;
  if (is_empty(x, out_features)) {
    y = zeros(x, out_features);
  } else {
    const auto at = places(indices, out_features, last(x, "x"));
    const Tensor c = at::view_as_complex(coefficients.to(compute_dtype(x)).contiguous()).unsqueeze(1);
    const Tensor products = conjugate_where(at.beyond, c * spectra_at(x, at.v));
    y = synthesise(products, at.u, out_features, scale, x);
  }
  return bias.has_value() ? at::add(y, bias->to(y.scalar_type())) : y;
}

Tensor linear_dx(const Tensor& gradient, const Tensor& coefficients, const Tensor& indices, int64_t in_features,
                 double scale) {
  check_indices(indices, scale);
  check_coefficients(coefficients, indices);
  check_count(in_features, "in_features");
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  if (is_empty(gradient, in_features)) return zeros(gradient, in_features);
  const auto at = places(indices, last(gradient, "gradient"), in_features);
  const Tensor c = at::view_as_complex(coefficients.to(compute_dtype(gradient)).contiguous()).unsqueeze(1);
  const Tensor products = c.conj() * conjugate_where(at.beyond, spectra_at(gradient, at.u));
  return synthesise(products, at.v, in_features, scale, gradient);
}

Tensor linear_dc(const Tensor& gradient, const Tensor& x, const Tensor& indices, double scale) {
  check_indices(indices, scale);
  check_leading(gradient, x);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  if (is_empty(gradient, last(x, "x")))
    return at::zeros({indices.size(1), 2}, gradient.options().dtype(compute_dtype(gradient)));
  const auto at = places(indices, last(gradient, "gradient"), last(x, "x"));
  const Tensor g = conjugate_where(at.beyond, spectra_at(gradient, at.u));
  const Tensor products = g * spectra_at(x.to(compute_dtype(gradient)), at.v).conj();
  return at::view_as_real(products.sum(1)) * scale;
}

TORCH_LIBRARY_IMPL(infold, CUDA, m) {
  m.impl("sparse_frequency_linear", linear);
  m.impl("sparse_frequency_linear_dx", linear_dx);
  m.impl("sparse_frequency_linear_dc", linear_dc);
}

}  // namespace
}  // namespace infold

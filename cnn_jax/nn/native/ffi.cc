// The library's operations, as XLA calls them, and one function for tests that need no XLA.
#include "depthwise.h"
#include "direct.h"
#include "kernel_gradient.h"
#include "winograd.h"
#include "xla/ffi/api/ffi.h"

enum Product { FORWARD, INPUT_GRADIENT, KERNEL_GRADIENT };

static void run(const Pool& pool, Product product, const Geometry& g, bool fast, const float* a, const float* b, float* out) {
  const bool gradient = product == INPUT_GRADIENT;
  if (is_depthwise(g))
    product == KERNEL_GRADIENT ? depthwise_kernel_gradient(pool, g, a, b, out) : depthwise(pool, g, gradient, a, b, out);
  else if (fast && winograd_fits(g))
    product == KERNEL_GRADIENT ? winograd_kernel_gradient(pool, g, a, b, out) : winograd(pool, g, gradient, a, b, out);
  else if (product == KERNEL_GRADIENT) kernel_gradient(pool, g, a, b, out);
  else if (gradient) input_gradient(pool, g, a, b, out);
  else forward(pool, g, a, b, out);
}

namespace ffi = xla::ffi;
using Array = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;
using Numbers = ffi::Span<const int64_t>;

static Pool pool_of(ffi::ThreadPool& threads) {
  return Pool(threads.num_threads(), [&threads](std::function<void()> f) { threads.Schedule(std::move(f)); });
}

// Operands may have a leading axis of runs that are trained together, as the result then has.
static Numbers inner(Numbers shape) { return {shape.end() - 4, 4}; }
static size_t floats(Numbers shape) { return shape[0] * shape[1] * shape[2] * shape[3]; }

// window: stride, padding before, dilation (rows and columns each), groups
static Geometry geometry(Numbers x, Numbers k, Numbers y, Numbers window) {
  const auto i = [](int64_t n) { return (int)n; };
  return {i(x[0]), i(x[1]), i(x[2]), i(x[3]), i(k[0]), i(k[1]), i(k[3]), i(y[1]), i(y[2]), i(window[0]),
          i(window[1]), i(window[2]), i(window[3]), i(window[4]), i(window[5]), i(window[6])};
}

template <Product product>
static ffi::Error Convolve(ffi::ThreadPool threads, Array a, Array b, Result out, Numbers window, bool winograd) {
  const Numbers shapes[] = {inner(a.dimensions()), inner(b.dimensions()), inner(out->dimensions())};
  // Which of the three is image, kernel and output.
  constexpr int ROLES[3][3] = {{0, 1, 2}, {2, 1, 0}, {0, 2, 1}};
  const Geometry g = geometry(shapes[ROLES[product][0]], shapes[ROLES[product][1]], shapes[ROLES[product][2]], window);
  const Pool pool = pool_of(threads);
  const size_t size = floats(shapes[2]), runs = out->element_count() / size;
  for (size_t r = 0; r < runs; r++)
    run(pool, product, g, winograd, a.typed_data() + (a.dimensions().size() > 4 ? r * floats(shapes[0]) : 0),
        b.typed_data() + (b.dimensions().size() > 4 ? r * floats(shapes[1]) : 0), out->typed_data() + r * size);
  return ffi::Error::Success();
}

// Layers of frozen networks: ReLU(x ∗ k + bias), of a kernel [kh, kw, c, f] or its transform.
static ffi::Error Transform(ffi::ThreadPool threads, Array k, Result U) {
  const auto shape = k.dimensions();
  transform_kernel(pool_of(threads), k.typed_data(), shape[2], shape[3], false, U->typed_data());
  return ffi::Error::Success();
}
static ffi::Error Frozen(ffi::ThreadPool threads, Array x, Array k, Array bias, Result y, Numbers window, bool relu) {
  const Epilogue epilogue{bias.typed_data(), relu};
  const Numbers in = x.dimensions(), out = y->dimensions();
  const Pool pool = pool_of(threads);
  if (k.dimensions().size() == 4)
    forward(pool, geometry(in, k.dimensions(), out, window), x.typed_data(), k.typed_data(), y->typed_data(), epilogue);
  else
    winograd(pool, x.typed_data(), in[0], in[1], in[2], in[3], window[2], window[3], k.typed_data(), y->typed_data(),
             out[1], out[2], out[3], epilogue);
  return ffi::Error::Success();
}

#define PRODUCT(name, product)                                                                                   \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, Convolve<product>, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Array>()   \
                                    .Arg<Array>().Ret<Array>().Attr<Numbers>("window").Attr<bool>("winograd"))
PRODUCT(conv, FORWARD);
PRODUCT(conv_input_gradient, INPUT_GRADIENT);
PRODUCT(conv_kernel_gradient, KERNEL_GRADIENT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(conv_frozen, Frozen, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Array>().Arg<Array>()
                                  .Arg<Array>().Ret<Array>().Attr<Numbers>("window").Attr<bool>("relu"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(transform, Transform, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Array>().Ret<Array>());

// For tests: by `threads` threads of its own.
extern "C" void convolve(int product, const int* geometry, int winograd, int threads, const float* a, const float* b,
                         float* out) {
  Geometry g;
  memcpy(&g, geometry, sizeof g);
  const Pool pool(threads, [](std::function<void()> f) { std::thread(std::move(f)).detach(); });
  run(pool, (Product)product, g, winograd, a, b, out);
}

// Gradient of the kernel: dk[p, q, c, f] = Σ_{b,i,j} x̃[b, i·sh + p·dh, j·sw + q·dw, c] · dy[b, i, j, f].
//
// A tile keeps the sums of CB numbers of a window and NV vectors of filters in registers, while it
// runs over the pixels of a strip: per pixel CB broadcasts and NV loads for CB·NV multiply-adds.
// x is packed as [c/16][row][column][16] with CB = 8 channels of one tap; where 16 does not divide
// the channels, as [row][column][c], and the tile takes numbers that lie together in the window: all
// kw·c of a row of taps without dilation, c of a tap else. dy is packed as [f/(NV·VL)][pixel][NV·VL].
// A strip has some 256 pixels, so that what all taps read again and again (16 KB of x, 32 KB of dy)
// stays in the first caches.
//
// A task is a part of the channels, a part of the filters, and a chunk of the strips, whose sums
// are added in order in the end. Parts and chunks follow from the shape.
#pragma once
#include "direct.h"

struct Outer {
  const float* const* x;  // where the rows of pixels begin
  const float* const* dy;
  size_t x_at, dy_at, x_step, dy_step;  // added to each row; from pixel to pixel
  int rows, columns;
  float* sum;
  size_t step;  // from number to number of the window
};

template <int CB, int NV>
KERNEL void outer(const Outer& a) {
  vec sum[CB][NV];
  UNROLL for (int c = 0; c < CB; c++)
    UNROLL for (int v = 0; v < NV; v++) sum[c][v] = load(a.sum + c * a.step + v * VL);
  for (int r = 0; r < a.rows; r++) {
    const float *x = a.x[r] + a.x_at, *dy = a.dy[r] + a.dy_at;
    _Pragma("GCC unroll 2") for (int j = 0; j < a.columns; j++, x += a.x_step, dy += a.dy_step) {
      vec d[NV];
      UNROLL for (int v = 0; v < NV; v++) d[v] = load(dy + v * VL);
      UNROLL for (int c = 0; c < CB; c++)
        UNROLL for (int v = 0; v < NV; v++) sum[c][v] += x[c] * d[v];
    }
  }
  UNROLL for (int c = 0; c < CB; c++)
    UNROLL for (int v = 0; v < NV; v++) store(a.sum + c * a.step + v * VL, sum[c][v]);
}
template <int NV, int... I>
static void run_outer(int numbers, const Outer& a, std::integer_sequence<int, I...>) {
  static constexpr void (*table[])(const Outer&) = {outer<I + 1, NV>...};
  table[numbers - 1](a);
}
// Sums of `numbers` numbers of the window, in tiles of nearly equal length.
static void run_outer(int numbers, int nv, Outer a) {
  const int tiles = ceil_div(numbers, nv == 1 ? LONGEST[1] : std::min(LONGEST[2], 12));
  float* const sum = a.sum;
  const size_t at = a.x_at;
  for (int k = 0; k < tiles; k++) {
    const int first = share(numbers, k, tiles), end = share(numbers, k + 1, tiles);
    a.sum = sum + first * a.step;
    a.x_at = at + first;
    if (nv == 1) run_outer<1>(end - first, a, std::make_integer_sequence<int, LONGEST[1]>());
    else run_outer<2>(end - first, a, std::make_integer_sequence<int, std::min(LONGEST[2], 12)>());
  }
}

// How a gradient of `size` numbers is cut into tasks of some 8 million multiply-adds, their number a
// power of 2. The chunks' sums are written and read once more: 1 MB of them, or one for each 1024
// multiply-adds, is little.
struct Cut {
  int channels = 1, filters = 1, chunks = 1;
  Cut(double work, size_t size, int C, int F, bool divisible, int units) {
    int want = 1;
    while (want < 32 && 2 * want * 8e6 <= work) want *= 2;
    const double room = std::max(262144., work / 1024) / size;
    while (2 * chunks <= std::min<double>(room, std::min(want, units))) chunks *= 2;
    while (divisible && tasks() < want && C % (64 * channels) == 0) channels *= 2;
    while (tasks() < want && F % (128 * filters) == 0) filters *= 2;
    while (tasks() < std::min(want, 4) && 2 * chunks <= units) chunks *= 2;
  }
  int tasks() const { return channels * filters * chunks; }
};

// sums[i] of all chunks, [chunk][size], to out, row by row; `row` floats of which F are wanted.
static void add_chunks(const Pool& pool, const float* parts, int chunks, size_t size, int row, int F, float* out,
                       size_t step) {
  const int rows = size / row, tasks = std::clamp<int>(size >> 13, 1, 16);
  pool.run(tasks, [&](int task) {
    for (size_t r = share(rows, task, tasks); r < share(rows, task + 1, tasks); r++)
      for (int f = 0; f < F; f += VL) {
        vec sum = load(parts + r * row + f);
        for (int c = 1; c < chunks; c++) sum += load(parts + c * size + r * row + f);
        store(out + r * step + f, sum, F - f);
      }
  });
}

static void kernel_gradient_of_group(const Pool& pool, const Geometry& g, const float* x, const float* dy, float* dk) {
  const int C = g.C / g.groups, F = g.F / g.groups, padded = ceil_div(F, VL) * VL;
  const int nv = padded > VL ? 2 : 1, width = nv * VL, taps = g.KH * g.KW;
  const bool blocked = C % BLOCK == 0;
  const int merged = !blocked && g.dw == 1 ? g.KW : 1;  // taps whose numbers lie together
  const int columns = (g.OW - 1) * g.sw + (g.KW - 1) * g.dw + 1;
  // Units of work: some images, or strips of one.
  const int images = std::clamp(256 / (g.OH * g.OW), 1, g.B);
  const int strips = ceil_div(g.OH, std::max(2, 256 / g.OW)), units = ceil_div(g.B, images) * strips;
  const size_t size = (size_t)taps * C * padded;
  const Cut cut((double)g.B * g.OH * g.OW * taps * C * F, size, C, F, blocked, units);
  const bool in_place = cut.chunks == 1 && padded == g.F && g.groups == 1;
  float* parts = in_place ? dk : scratch(PARTS, cut.chunks * size);
  const int channels = C / cut.channels, filters = cut.filters == 1 ? padded : F / cut.filters;
  const bool pack_dy = g.F != width || g.groups > 1;
  pool.run(cut.tasks(), [&](int task) {
    const int chunk = task % cut.chunks, c0 = task / cut.chunks % cut.channels * channels;
    const int f0 = task / cut.chunks / cut.channels * filters;
    float* sums = parts + chunk * size + f0;
    for (int t = 0; t < taps; t++)
      for (int c = c0; c < c0 + channels; c++) memset(sums + ((size_t)t * C + c) * padded, 0, 4 * filters);
    std::vector<const float*> x_rows, dy_rows;
    for (int unit = share(units, chunk, cut.chunks); unit < (int)share(units, chunk + 1, cut.chunks); unit++) {
      const int b0 = unit / strips * images, n = std::min(images, g.B - b0);
      const int i0 = share(g.OH, unit % strips, strips), rows = share(g.OH, unit % strips + 1, strips) - i0;
      // Without sorting of columns: pixels are a step of sw apart.
      Packed strip{i0 * g.sh - g.ph, (rows - 1) * g.sh + (g.KH - 1) * g.dh + 1, -g.pw, columns, 1, true, nullptr};
      const size_t one = (size_t)strip.rows * columns, all = n * one;  // pixels
      float* packed = scratch(PACKED, all * channels);
      const size_t pixels = (size_t)n * rows * g.OW;
      float* gradient = pack_dy ? scratch(GRADIENT, pixels * ceil_div(filters, width) * width) : nullptr;
      x_rows.clear();
      dy_rows.clear();
      for (int b = 0; b < n; b++) {
        const float* image = x + (size_t)(b0 + b) * g.H * g.W * g.C + c0;
        for (int c = 0; c < channels; c += blocked ? BLOCK : channels) {
          strip.data = packed + all * c + b * one * (blocked ? BLOCK : channels);
          if (blocked) strip.fill(image + c, g.H, g.W, g.C, BLOCK);
          else strip.copy(image, g.H, g.W, g.C, channels);
        }
        for (int i = 0; i < rows; i++) {
          x_rows.push_back(packed + (b * one + (size_t)i * g.sh * columns) * (blocked ? BLOCK : channels));
          const float* from = dy + ((size_t)(b0 + b) * g.OH + i0 + i) * g.OW * g.F + f0;
          const size_t first = ((size_t)b * rows + i) * g.OW;
          dy_rows.push_back(pack_dy ? gradient + first * width : from);
          for (int f = 0; pack_dy && f < filters; f += VL) {
            float* to = gradient + (f / width * pixels + first) * width + f % width;
            for (int j = 0; j < g.OW; j++) store(to + j * width, load(from + (size_t)j * g.F + f, F - f0 - f));
          }
        }
      }
      Outer a{x_rows.data(), dy_rows.data(), 0, 0, (size_t)g.sw * (blocked ? BLOCK : channels), (size_t)width,
              (int)x_rows.size(), g.OW, nullptr, (size_t)padded};
      for (int f = 0; f < filters; f += width) {
        const int vectors = std::min(nv, (filters - f) / VL);
        const int numbers = !blocked ? merged * channels : vectors == 1 ? BLOCK : BLOCK / 2;
        a.dy_at = f / width * pixels * width;
        for (int c = 0; c < channels; c += blocked ? numbers : channels)
          for (int p = 0; p < g.KH; p++)
            for (int q = 0; q < g.KW; q += merged) {
              const size_t place = (size_t)p * g.dh * columns + q * g.dw;
              a.x_at = blocked ? c / BLOCK * all * BLOCK + place * BLOCK + c % BLOCK : place * channels;
              a.sum = sums + ((size_t)(p * g.KW + q) * C + c0 + c) * padded + f;
              run_outer(numbers, vectors, a);
            }
      }
    }
  });
  if (!in_place) add_chunks(pool, parts, cut.chunks, size, padded, F, dk, g.F);
}

static void kernel_gradient(const Pool& pool, const Geometry& g, const float* x, const float* dy, float* dk) {
  for (int group = 0; group < g.groups; group++)
    kernel_gradient_of_group(pool, g, x + group * (g.C / g.groups), dy + group * (g.F / g.groups),
                             dk + group * (g.F / g.groups));
}

// Depthwise convolution: as many groups as channels and filters. Each channel is by itself, so a
// vector is VL channels of a pixel, and nothing is packed: the sums of a row of pixels stay in the
// first cache, and each tap adds its products to those pixels that it covers. Such a layer moves
// more memory than it multiplies: what counts is that images are read in order.
#pragma once
#include "kernel_gradient.h"

static bool is_depthwise(const Geometry& g) { return g.groups == g.C && g.C == g.F; }

// Outputs j of 0..OW whose input j·sw + q·dw − pw lies in 0..W.
static void covered(const Geometry& g, int q, int& first, int& end) {
  first = std::clamp(ceil_div(g.pw - q * g.dw, g.sw), 0, g.OW);
  end = std::clamp(ceil_div(g.W + g.pw - q * g.dw, g.sw), first, g.OW);
}

// One row of y [OW][C], or of dx [W][C], for n ≤ VL channels; `other` is the image or dy.
static void depthwise_row(const Geometry& g, bool gradient, const float* other, const float* k, int row, float* out, int n) {
  const int wide = gradient ? g.W : g.OW, C = g.C;
  float* sums = scratch(TRANSFORMED, (size_t)wide * VL);
  memset(sums, 0, (size_t)4 * wide * VL);
  for (int p = 0; p < g.KH; p++) {
    int line = row * g.sh + p * g.dh - g.ph;  // of x
    if (gradient) {  // of dy, if this tap covers the row at all
      line = row + g.ph - p * g.dh;
      if (line < 0 || line % g.sh || (line /= g.sh) >= g.OH) continue;
    } else if (line < 0 || line >= g.H) continue;
    for (int q = 0; q < g.KW; q++) {
      int first, end;
      covered(g, q, first, end);
      const vec w = load(k + (size_t)(p * g.KW + q) * C, n);
      const int column = q * g.dw - g.pw;
      const float* from = other + (size_t)line * (gradient ? g.OW : g.W) * C;
      for (int j = first; j < end; j++) {
        const int at = j * g.sw + column;  // of x
        float* sum = sums + (gradient ? at : j) * VL;
        store(sum, load(sum) + w * load(from + (size_t)(gradient ? j : at) * C, n));
      }
    }
  }
  for (int j = 0; j < wide; j++) store(out + (size_t)j * C, load(sums + j * VL), n);
}

static void depthwise(const Pool& pool, const Geometry& g, bool gradient, const float* other, const float* k, float* out) {
  const int high = gradient ? g.H : g.OH, wide = gradient ? g.W : g.OW;
  const size_t other_size = (size_t)(gradient ? g.OH * g.OW : g.H * g.W) * g.C;
  const int rows = std::max(1, 65536 / (wide * g.C)), strips = ceil_div(high, rows);
  pool.run(g.B * strips, [&](int task) {
    const int b = task / strips, first = task % strips * rows;
    for (int c = 0; c < g.C; c += VL)
      for (int i = first; i < std::min(high, first + rows); i++)
        depthwise_row(g, gradient, other + b * other_size + c, k + c, i,
                      out + ((size_t)b * high + i) * wide * g.C + c, std::min(VL, g.C - c));
  });
}

static void depthwise_kernel_gradient(const Pool& pool, const Geometry& g, const float* x, const float* dy, float* dk) {
  const int blocks = ceil_div(g.C, VL), chunks = std::clamp(32 / blocks, 1, g.B), taps = g.KH * g.KW;
  const size_t size = (size_t)taps * blocks * VL;
  float* parts = scratch(PARTS, chunks * size);
  pool.run(blocks * chunks, [&](int task) {
    const int chunk = task % chunks, c = task / chunks * VL, n = std::min(VL, g.C - c);
    for (int t = 0; t < taps; t++) {
      int first, end;
      covered(g, t % g.KW, first, end);
      const int column = t % g.KW * g.dw - g.pw;
      vec sum[4] = {};
      for (int b = share(g.B, chunk, chunks); b < (int)share(g.B, chunk + 1, chunks); b++)
        for (int i = 0; i < g.OH; i++) {
          const int y = i * g.sh + t / g.KW * g.dh - g.ph;
          if (y < 0 || y >= g.H) continue;
          const float* from = x + ((size_t)b * g.H + y) * g.W * g.C + c;
          const float* by = dy + ((size_t)b * g.OH + i) * g.OW * g.C + c;
          for (int j = first; j < end; j++)
            sum[j % 4] += load(from + (size_t)(j * g.sw + column) * g.C, n) * load(by + (size_t)j * g.C, n);
        }
      store(parts + chunk * size + (size_t)t * blocks * VL + c, sum[0] + sum[1] + (sum[2] + sum[3]));
    }
  });
  add_chunks(pool, parts, chunks, size, blocks * VL, g.C, dk, g.C);
}

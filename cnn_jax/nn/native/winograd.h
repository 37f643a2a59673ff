// Winograd's F(4×4, 3×3), for 3×3 kernels of stride 1: a quarter of the multiplications.
//
//   y = Aᵀ [(G k Gᵀ) ⊙ (Bᵀ x B)] A         for each tile of 6×6 pixels of x, 4×4 of y
//   dk = Gᵀ [Σ_tiles (Bᵀ x B) ⊙ (A dy Aᵀ)] G
//
// Summed over channels or tiles, each of the 36 places of a tile is a matrix product. The gradient
// of the images is the first form of dy and the kernel turned by 180°.
//
// A task transforms T tiles of all channels, V [36][c/16][T][16], multiplies them by the kernels'
// transforms U [36][f/(NV·VL)][c][NV·VL], with the register tile of direct.h whose "pixels" are
// tiles, into M [36][T][f], and transforms these: V and M stay in the second cache, and neither is
// ever in main memory. Large layers make tasks of 128 filters, which transform x anew (a 20th of the
// work), so that M stays small and there are enough tasks. U is streamed through the caches once for
// each T tiles; with many channels it is larger than V, so T is large there.
//
// Source: Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks".
#pragma once
#include "kernel_gradient.h"

constexpr int TILE = 4, POINTS = 36;
constexpr size_t SKEW = 80;  // so that 36 matrices do not fall on the same lines of a cache

static bool winograd_fits(const Geometry& g) {
  const int covered = ceil_div(g.OH, TILE) * TILE * ceil_div(g.OW, TILE) * TILE;
  return g.KH == 3 && g.KW == 3 && g.sh == 1 && g.sw == 1 && g.dh == 1 && g.dw == 1 && g.groups == 1 &&
         g.C % BLOCK == 0 && g.F % BLOCK == 0 && 2 * covered <= 3 * g.OH * g.OW;
}
static int vectors_of(int F) { return F % (2 * VL) ? 1 : 2; }

// Bᵀ, Aᵀ and G, A and Gᵀ times a vector of vectors, `s` and `t` apart.
static INLINE void times_bt(const vec* x, int s, vec* y, int t) {
  const vec a = x[4 * s] - 4 * x[2 * s], b = x[3 * s] - 4 * x[s], c = x[4 * s] - x[2 * s], d = 2 * (x[3 * s] - x[s]);
  y[0] = 4 * x[0] - 5 * x[2 * s] + x[4 * s];
  y[t] = a + b;
  y[2 * t] = a - b;
  y[3 * t] = c + d;
  y[4 * t] = c - d;
  y[5 * t] = 4 * x[s] - 5 * x[3 * s] + x[5 * s];
}
static INLINE void times_at(const vec* x, int s, vec* y, int t) {
  const vec a = x[s] + x[2 * s], b = x[s] - x[2 * s], c = x[3 * s] + x[4 * s], d = x[3 * s] - x[4 * s];
  y[0] = x[0] + a + c;
  y[t] = b + 2 * d;
  y[2 * t] = a + 4 * c;
  y[3 * t] = b + 8 * d + x[5 * s];
}
static INLINE void times_g(const vec* x, int s, vec* y, int t) {
  const vec a = (x[0] + x[2 * s]) * (-1.f / 6), b = x[s] * (1.f / 6);
  const vec c = x[0] * (1.f / 24) + x[2 * s] * (1.f / 6), d = x[s] * (1.f / 12);
  y[0] = x[0] * .25f;
  y[t] = a - b;
  y[2 * t] = a + b;
  y[3 * t] = c + d;
  y[4 * t] = c - d;
  y[5 * t] = x[2 * s];
}
static INLINE void times_a(const vec* x, int s, vec* y, int t) {
  const vec a = x[0] + x[2 * s], b = x[s] + x[3 * s], c = x[0] + 4 * x[2 * s], d = 2 * x[s] + 8 * x[3 * s];
  y[0] = x[0];
  y[t] = a + b;
  y[2 * t] = a - b;
  y[3 * t] = c + d;
  y[4 * t] = c - d;
  y[5 * t] = x[3 * s];
}
static INLINE void times_gt(const vec* x, int s, vec* y, int t) {
  const vec a = (x[s] + x[2 * s]) * (1.f / 6), b = x[3 * s] + x[4 * s];
  y[0] = x[0] * .25f - a + b * (1.f / 24);
  y[t] = (x[2 * s] - x[s]) * (1.f / 6) + (x[3 * s] - x[4 * s]) * (1.f / 12);
  y[2 * t] = b * (1.f / 6) - a + x[5 * s];
}

// The square of N×N vectors at the image's (i, j), zeros outside of it; `image` has C channels.
template <int N>
static INLINE void take(const float* image, int H, int W, int C, int i, int j, vec* x) {
  if (i >= 0 && j >= 0 && i + N <= H && j + N <= W) {
    const float* from = image + ((size_t)i * W + j) * C;
    UNROLL for (int a = 0; a < N; a++)
      UNROLL for (int b = 0; b < N; b++) x[a * N + b] = load(from + ((size_t)a * W + b) * C);
  } else
    for (int a = 0; a < N; a++)
      for (int b = 0; b < N; b++) {
        const bool inside = i + a >= 0 && i + a < H && j + b >= 0 && j + b < W;
        x[a * N + b] = inside ? load(image + ((size_t)(i + a) * W + j + b) * C) : vec{};
      }
}

// Asks for N×N pixels, one line of memory each, of a later tile: tiles touch too many rows at once
// for the machine to foresee what is next, and would wait for each.
template <int N>
static INLINE void ask_for(const float* from, int W, int C, bool to_write) {
  UNROLL for (int a = 0; a < N; a++)
    UNROLL for (int b = 0; b < N; b++) {
      const float* pixel = from + ((ptrdiff_t)a * W + b) * C;
      if (to_write) __builtin_prefetch(pixel, 1);
      else __builtin_prefetch(pixel);
    }
}
constexpr int AHEAD = 4;  // tiles

// The tiles of a batch of images [B, H, W, C]: number → place.
struct Tiles {
  int down, across, total;
  Tiles(int B, int OH, int OW) : down(ceil_div(OH, TILE)), across(ceil_div(OW, TILE)), total(B * down * across) {}
  void place(int number, int& b, int& i, int& j) const {
    b = number / (down * across);
    i = number / across % down * TILE;
    j = number % across * TILE;
  }
  // Where the first pixel of the tile AHEAD of this one lies, in images of H×W pixels of C numbers.
  ptrdiff_t ahead(int number, int H, int W, int C, int ph, int pw) const {
    int b, i, j;
    place(std::min(number + AHEAD, total - 1), b, i, j);
    return (((ptrdiff_t)b * H + i - ph) * W + j - pw) * C;
  }
};

// Bᵀ x B of n tiles from `start` on, channels [0, channels) of C, to V [36][c/16][room][16].
static void transform_images(const Tiles& tiles, int start, int n, const float* x, int H, int W, int C, int channels,
                             int ph, int pw, float* V, size_t point, int room) {
  for (int t = 0; t < n; t++) {
    int b, i, j;
    tiles.place(start + t, b, i, j);
    const float* ahead = x + tiles.ahead(start + t, H, W, C, ph, pw);
    for (int c = 0; c < channels; c += VL) {
      vec u[36], v[36];
      ask_for<6>(ahead + c, W, C, false);
      take<6>(x + (size_t)b * H * W * C + c, H, W, C, i - ph, j - pw, u);
      UNROLL for (int q = 0; q < 6; q++) times_bt(u + q, 6, v + q, 6);
      float* to = V + ((size_t)c / BLOCK * room + t) * BLOCK + c % BLOCK;
      UNROLL for (int a = 0; a < 6; a++) {
        vec r[6];
        times_bt(v + a * 6, 1, r, 1);
        UNROLL for (int q = 0; q < 6; q++) store(to + (a * 6 + q) * point, r[q]);
      }
    }
  }
}

// U = G k Gᵀ, [36][f/width][c][width], of the kernel or the one turned and transposed.
static void transform_kernel(const Pool& pool, const float* k, int C, int F, bool transposed, float* U) {
  const int in = transposed ? F : C, out = transposed ? C : F, width = vectors_of(out) * VL, panels = out / width;
  float* p = scratch(PANELS, (size_t)9 * C * F);
  std::vector<int> taps(9);
  for (int t = 0; t < 9; t++) taps[t] = transposed ? 8 - t : t;
  make_panels(pool, k, C, F, transposed, 1, taps, width, p);
  const int cuts = std::max(1, in / 16);
  pool.run(panels * cuts, [&](int task) {
    const int panel = task / cuts;
    for (int c = share(in, task % cuts, cuts); c < (int)share(in, task % cuts + 1, cuts); c++)
      for (int v = 0; v < width; v += VL) {
        vec x[9], y[18];
        for (int t = 0; t < 9; t++) x[t] = load(p + (((size_t)panel * 9 + t) * in + c) * width + v);
        UNROLL for (int q = 0; q < 3; q++) times_g(x + q, 3, y + q, 3);
        UNROLL for (int a = 0; a < 6; a++) {
          vec r[6];
          times_g(y + a * 3, 1, r, 1);
          UNROLL for (int q = 0; q < 6; q++)
            store(U + (((size_t)(a * 6 + q) * panels + panel) * in + c) * width + v, r[q]);
        }
      }
  });
}

// y [B, OH, OW, F] of x [B, H, W, C], ph rows and pw columns of zeros before it.
static void winograd(const Pool& pool, const float* x, int B, int H, int W, int C, int ph, int pw, const float* U,
                     float* y, int OH, int OW, int F, Epilogue epilogue = {}) {
  const Tiles tiles(B, OH, OW);
  const int nv = vectors_of(F), width = nv * VL, panels = F / width, blocks = C / BLOCK;
  const int parts = F > 128 && F % 128 == 0 ? F / 128 : 1, filters = F / parts;
  // Few channels make V and M small, and then the number of tasks is one that many cores divide.
  const int chunks = C >= 256 ? ceil_div(tiles.total, 112) : ceil_div(tiles.total, 8 * 42) * 8;
  const int T = ceil_div(tiles.total, chunks);
  pool.run(chunks * parts, [&](int task) {
    const int start = task / parts * T, n = std::min(T, tiles.total - start), f0 = task % parts * filters;
    if (n <= 0) return;
    const size_t v_point = (size_t)blocks * T * BLOCK + SKEW, m_point = (size_t)T * filters + SKEW;
    float* V = scratch(TRANSFORMED, POINTS * v_point);
    float* M = scratch(PRODUCTS, POINTS * m_point);
    transform_images(tiles, start, n, x, H, W, C, C, ph, pw, V, v_point, T);
    Tile tile{};
    tile.count = 1;
    tile.blocks = blocks;
    tile.block = (size_t)T * BLOCK;
    tile.step = filters;
    tile.filters = width;
    tile.floor = Epilogue{}.floor();
    const vec floor = epilogue.floor();
    const int rows = ceil_div(n, LONGEST[nv]);
    for (int point = 0; point < POINTS; point++) {
      const float* v = V + point * v_point;
      tile.taps = &v;
      for (int f = 0; f < filters; f += width) {
        tile.w = U + ((size_t)point * panels + (f0 + f) / width) * C * width;
        for (int k = 0; k < rows; k++) {
          const int first = share(n, k, rows), end = share(n, k + 1, rows);
          tile.at = first * BLOCK;
          tile.out = M + point * m_point + (size_t)first * filters + f;
          run_tile(end - first, nv, true, tile);
        }
      }
    }
    for (int t = 0; t < n; t++) {
      int b, i, j;
      tiles.place(start + t, b, i, j);
      const int columns = std::min(TILE, OW - j), lines = std::min(TILE, OH - i);
      const float* ahead = y + tiles.ahead(start + t, OH, OW, F, 0, 0) + f0;
      for (int f = 0; f < filters; f += VL) {
        vec m[36], s[24];
        ask_for<TILE>(ahead + f, OW, F, true);
        UNROLL for (int p = 0; p < 36; p++) m[p] = load(M + p * m_point + (size_t)t * filters + f);
        UNROLL for (int q = 0; q < 6; q++) times_at(m + q, 6, s + q, 6);
        const vec bias = epilogue.bias ? load(epilogue.bias + f0 + f) : vec{};
        float* to = y + (((size_t)b * OH + i) * OW + j) * F + f0 + f;
        for (int a = 0; a < lines; a++) {
          vec r[4];
          times_at(s + a * 6, 1, r, 1);
          for (int q = 0; q < columns; q++) store(to + ((size_t)a * OW + q) * F, at_least(floor, r[q] + bias));
        }
      }
    }
  });
}

// The forward product, or the gradient of the images.
static void winograd(const Pool& pool, const Geometry& g, bool gradient, const float* a, const float* k, float* out) {
  float* U = scratch(KERNELS, (size_t)POINTS * g.C * g.F);
  transform_kernel(pool, k, g.C, g.F, gradient, U);
  if (gradient) winograd(pool, a, g.B, g.OH, g.OW, g.F, 2 - g.ph, 2 - g.pw, U, out, g.H, g.W, g.C);
  else winograd(pool, a, g.B, g.H, g.W, g.C, g.ph, g.pw, U, out, g.OH, g.OW, g.F);
}

static void winograd_kernel_gradient(const Pool& pool, const Geometry& g, const float* x, const float* dy, float* dk) {
  const Tiles tiles(g.B, g.OH, g.OW);
  const int C = g.C, F = g.F, nv = vectors_of(F), width = nv * VL, T = 64;
  const size_t size = (size_t)POINTS * C * F;
  const Cut cut(9. / 4 * g.B * g.OH * g.OW * C * F, size, C, 1, true, ceil_div(tiles.total, T));
  const int channels = C / cut.channels;
  float* parts = scratch(PARTS, cut.chunks * size);
  pool.run(cut.tasks(), [&](int task) {
    const int chunk = task % cut.chunks, c0 = task / cut.chunks * channels;
    float* sums = parts + chunk * size;
    for (int p = 0; p < POINTS; p++) memset(sums + ((size_t)p * C + c0) * F, 0, (size_t)4 * channels * F);
    const size_t v_point = (size_t)channels * T + SKEW, d_point = (size_t)F * T + SKEW;
    float* V = scratch(TRANSFORMED, POINTS * v_point);
    float* D = scratch(PRODUCTS, POINTS * d_point);
    const int end = share(tiles.total, chunk + 1, cut.chunks);
    for (int start = share(tiles.total, chunk, cut.chunks); start < end; start += T) {
      const int n = std::min(T, end - start);
      transform_images(tiles, start, n, x + c0, g.H, g.W, C, channels, g.ph, g.pw, V, v_point, T);
      for (int t = 0; t < n; t++) {
        int b, i, j;
        tiles.place(start + t, b, i, j);
        const float* ahead = dy + tiles.ahead(start + t, g.OH, g.OW, F, 0, 0);
        for (int f = 0; f < F; f += VL) {
          vec d[16], e[24];
          ask_for<TILE>(ahead + f, g.OW, F, false);
          take<4>(dy + (size_t)b * g.OH * g.OW * F + f, g.OH, g.OW, F, i, j, d);
          UNROLL for (int q = 0; q < 4; q++) times_a(d + q, 4, e + q, 4);
          float* to = D + ((size_t)f / width * T + t) * width + f % width;
          UNROLL for (int a = 0; a < 6; a++) {
            vec r[6];
            times_a(e + a * 4, 1, r, 1);
            UNROLL for (int q = 0; q < 6; q++) store(to + (a * 6 + q) * d_point, r[q]);
          }
        }
      }
      const int numbers = nv == 1 ? BLOCK : BLOCK / 2;
      for (int p = 0; p < POINTS; p++)
        for (int f = 0; f < F; f += width)
          for (int c = 0; c < channels; c += numbers) {
            const float *v = V + p * v_point + (size_t)c / BLOCK * T * BLOCK + c % BLOCK;
            const float *d = D + p * d_point + (size_t)f * T;
            run_outer(numbers, nv, Outer{&v, &d, 0, 0, BLOCK, (size_t)width, 1, n,
                                         sums + ((size_t)p * C + c0 + c) * F + f, (size_t)F});
          }
    }
  });
  const int tasks = std::clamp(C * F / 1024, 1, 16);
  pool.run(tasks, [&](int task) {
    for (int c = share(C, task, tasks); c < (int)share(C, task + 1, tasks); c++)
      for (int f = 0; f < F; f += VL) {
        vec m[36], s[18];
        for (int p = 0; p < POINTS; p++) {
          const float* from = parts + ((size_t)p * C + c) * F + f;
          m[p] = load(from);
          for (int q = 1; q < cut.chunks; q++) m[p] += load(from + q * size);
        }
        UNROLL for (int q = 0; q < 6; q++) times_gt(m + q, 6, s + q, 6);
        UNROLL for (int a = 0; a < 3; a++) {
          vec r[3];
          times_gt(s + a * 6, 1, r, 1);
          UNROLL for (int q = 0; q < 3; q++) store(dk + ((size_t)(a * 3 + q) * C + c) * F + f, r[q]);
        }
      }
  });
}

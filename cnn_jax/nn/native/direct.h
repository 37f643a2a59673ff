// Direct convolution: the forward product and the gradient of its images, by one machine.
//
//   out[b, u·oh + i₀, v·ow + j₀, f] = Σ_t Σ_c in[b, u·sh + ty_t, v·sw + tx_t, c] · w[t, c, f]
//
// Forward that is the definition. The gradient of the images is one such sum for each remainder
// of a pixel's place by the stride, since those pixels see the same taps (a *phase*); its input is
// dy, its stride 1, and its outputs are a stride apart.
//
// A task is a strip of rows of one image. Its input is copied once into working memory, with zeros
// around, so that the inner loop knows no edges: [c/16][row][column][16] where 16 divides the
// channels, else [c][row][column]. Columns are sorted by their remainder of sw, so that
// neighbouring outputs always read numbers 16 or 1 apart: constants of the machine code, also for
// a stem of 3 channels and stride 2. For each panel of NV·VL filters and each tile of P pixels the
// loop over taps and channels loads NV vectors of weights and multiplies them by P broadcast
// numbers: P·NV multiply-adds for P + NV loads, 28 for 16, of which the machine does 2 each a cycle.
#pragma once
#include "vector.h"

struct Tile {
  const float* const* taps;  // where each tap's first number lies; of planes, each channel's of each tap
  int count, blocks;
  size_t at, block;  // added to every tap; from block to block of channels
  const float* w;             // [tap][channel][NV·VL]
  float* out;
  size_t step;  // from pixel to pixel of out
  int filters;  // at most NV·VL are stored
  const float* bias;
  vec floor;
};

template <int P, int NV, int STEP>
KERNEL void tile(const Tile& a) {
  const float* w = a.w;
  vec sum[P][NV] = {};
  for (int t = 0; t < a.count; t++)
    for (int b = 0; b < a.blocks; b++) {
      const float* x = a.taps[t] + a.at + b * a.block;
      _Pragma("GCC unroll 2") for (int c = 0; c < STEP; c++, w += NV * VL) {
        vec weights[NV];
        UNROLL for (int v = 0; v < NV; v++) weights[v] = load(w + v * VL);
        UNROLL for (int p = 0; p < P; p++)
          UNROLL for (int v = 0; v < NV; v++) sum[p][v] += x[p * STEP + c] * weights[v];
      }
    }
  UNROLL for (int v = 0; v < NV; v++) {
    const int n = a.filters - v * VL;
    if (n <= 0) break;
    const vec bias = a.bias ? load(a.bias + v * VL, n) : vec{};
    float* out = a.out + v * VL;
    if (n >= VL)
      UNROLL for (int p = 0; p < P; p++) store(out + p * a.step, at_least(a.floor, sum[p][v] + bias));
    else
      UNROLL for (int p = 0; p < P; p++) store_part(out + p * a.step, at_least(a.floor, sum[p][v] + bias), n);
  }
}
template <int NV, int STEP, int... I>
static void run_tile(int pixels, const Tile& a, std::integer_sequence<int, I...>) {
  static constexpr void (*table[])(const Tile&) = {tile<I + 1, NV, STEP>...};
  table[pixels - 1](a);
}
static void run_tile(int pixels, int nv, bool blocked, const Tile& a) {
  const auto one = std::make_integer_sequence<int, LONGEST[1]>();
  const auto two = std::make_integer_sequence<int, LONGEST[2]>();
  if (nv == 1 && blocked) run_tile<1, BLOCK>(pixels, a, one);
  if (nv == 1 && !blocked) run_tile<1, 1>(pixels, a, one);
  if (nv == 2 && blocked) run_tile<2, BLOCK>(pixels, a, two);
  if (nv == 2 && !blocked) run_tile<2, 1>(pixels, a, two);
}

// A strip of an image, packed: zeros outside of the image, columns sorted by their remainder.
struct Packed {
  int row, rows, column, columns, remainders;
  bool blocked;
  float* data;

  size_t width() const { return ceil_div(columns, remainders); }
  size_t plane() const { return rows * remainders * width(); }  // numbers of one channel
  static size_t floats(int rows, int columns, int remainders, int channels) {
    return (size_t)rows * remainders * ceil_div(columns, remainders) * channels;
  }
  size_t step() const { return blocked ? BLOCK : 1; }
  size_t at(int y, int x) const {  // where the first number of a pixel of the image lies
    const int c = x - column;
    return (((y - row) * remainders + c % remainders) * width() + c / remainders) * step();
  }
  // image: its first channel; C: numbers from pixel to pixel
  void fill(const float* image, int H, int W, int C, int channels) const {
    const int wide = width(), parts = blocked ? channels / BLOCK : channels;
    for (int part = 0; part < parts; part++)
      for (int r = 0; r < rows; r++)
        for (int m = 0; m < remainders; m++) {
          const int y = row + r, first = column + m;  // column k of this line is first + k·remainders
          int lo = std::clamp(ceil_div(-first, remainders), 0, wide);
          int hi = std::clamp(ceil_div(W - first, remainders), lo, wide);
          if (y < 0 || y >= H) lo = hi = 0;
          float* to = data + part * plane() * step() + (size_t)(r * remainders + m) * wide * step();
          memset(to, 0, 4 * lo * step());
          memset(to + hi * step(), 0, 4 * (wide - hi) * step());
          if (lo == hi) continue;
          const size_t next = (size_t)remainders * C;
          const float* from = image + ((ptrdiff_t)y * W + first + lo * remainders) * C + part * step();
          if (blocked)
            for (int k = lo; k < hi; k++, from += next)
              for (int v = 0; v < BLOCK; v += VL) store(to + k * BLOCK + v, load(from + v));
          else
            for (int k = lo; k < hi; k++, from += next) to[k] = *from;
        }
  }
  // The same, all channels of a pixel together: [row][column][channels].
  void copy(const float* image, int H, int W, int C, int channels) const {
    const int lo = std::clamp(-column, 0, columns), hi = std::clamp(W - column, lo, columns);
    for (int r = 0; r < rows; r++) {
      const int y = row + r, first = y < 0 || y >= H ? columns : lo, end = std::max(first, y < 0 || y >= H ? 0 : hi);
      float* to = data + (size_t)r * columns * channels;
      memset(to, 0, (size_t)4 * first * channels);
      memset(to + (size_t)end * channels, 0, (size_t)4 * (columns - end) * channels);
      const float* from = image + ((ptrdiff_t)y * W + column + first) * C;
      if (C == channels) memcpy(to + (size_t)first * C, from, (size_t)4 * (end - first) * C);
      else for (int k = first; k < end; k++, from += C) memcpy(to + (size_t)k * channels, from, 4 * channels);
    }
  }
};

struct Phase {
  int u, u_end, v, v_end;  // outputs
  int i, j;                // of the place of output (0, 0)
  std::vector<int> taps, ty, tx;
  const float* w = nullptr;  // panels [f/(NV·VL)][tap][c][NV·VL] of every group
};
struct Sum {
  const float* in;
  int B, H, W, C;  // of the input
  float* out;
  int OH, OW, F, groups, sh, sw, oh, ow;
  Epilogue epilogue;
  std::vector<Phase> phases;
};

// Panels of the kernel [KH·KW, C/groups, F]; of the transposed one the sum runs over F.
static void make_panels(const Pool& pool, const float* k, int C, int F, bool transposed, int groups,
                        const std::vector<int>& taps, int width, float* out) {
  const int rows = transposed ? F / groups : C, columns = transposed ? C : F / groups;
  const int count = taps.size(), panels = ceil_div(columns, width), all = groups * panels * count;
  const size_t size = (size_t)rows * width;
  const int tasks = std::max<int>(1, std::min<size_t>(all, all * size >> 14));
  pool.run(tasks, [&](int task) {
    for (size_t q = share(all, task, tasks); q < share(all, task + 1, tasks); q++) {
      const int tap = taps[q % count], panel = q / count % panels, group = q / count / panels;
      const int first = panel * width, n = std::min(width, columns - first);
      const float* from = k + (size_t)tap * C * F + group * (F / groups);
      float* to = out + q * size;
      for (int r = 0; r < rows; r++, to += width)
        if (transposed)
          for (int c = 0; c < width; c++) to[c] = c < n ? from[(size_t)(first + c) * F + r] : 0;
        else
          for (int c = 0; c < width; c += VL) store(to + c, load(from + (size_t)r * F + first + c, n - c));
    }
  });
}

static void sum_over_taps(const Pool& pool, Sum& s, const float* k, bool transposed) {
  const int C = s.C / s.groups, F = s.F / s.groups, nv = F > VL ? 2 : 1, width = nv * VL;
  const int panels = ceil_div(F, width);
  size_t floats = 0;
  int u = INT32_MAX, u_end = INT32_MIN, left = INT32_MAX, right = INT32_MIN, reach = 0;
  for (const Phase& p : s.phases) {
    floats += (size_t)s.groups * panels * width * C * p.taps.size();
    u = std::min(u, p.u);
    u_end = std::max(u_end, p.u_end);
    for (size_t t = 0; t < p.taps.size(); t++) {
      left = std::min(left, p.v * s.sw + p.tx[t]);
      right = std::max(right, (p.v_end - 1) * s.sw + p.tx[t] + 1);
      reach = std::max(reach, std::abs(p.ty[t] - p.ty[0]));
    }
  }
  if (left > right) left = right = 0;
  float* w = scratch(PANELS, floats);
  for (Phase& p : s.phases) {
    make_panels(pool, k, transposed ? F : C, transposed ? s.C : s.F, transposed, s.groups, p.taps, width, w);
    p.w = w;
    w += (size_t)s.groups * panels * width * C * p.taps.size();
  }
  // A strip's input is at most 192 KB, a part of the second cache, and not less than 4 rows of
  // outputs. Where images are few, filters are tasks, too.
  const size_t row = std::max<size_t>(1, Packed::floats(1, right - left, s.sw, C));
  const int most = std::max(4, ((int)std::min<size_t>(49152 / row, 1 << 20) - reach) / s.sh);
  const int strips = ceil_div(u_end - u, most), rows = ceil_div(u_end - u, strips);
  const int cuts = std::clamp(16 / (s.groups * s.B * strips), 1, std::max(1, panels / 2));
  pool.run(s.groups * s.B * strips * cuts, [&](int task) {
    const int cut = task % cuts, strip = task / cuts % strips;
    const int b = task / cuts / strips % s.B, group = task / cuts / strips / s.B;
    const int a = u + strip * rows, z = a + rows;
    int top = INT32_MAX, bottom = INT32_MIN;
    for (const Phase& p : s.phases) {
      const int first = std::max(a, p.u), last = std::min(z, p.u_end) - 1;
      for (int ty : p.ty)
        if (first <= last) {
          top = std::min(top, first * s.sh + ty);
          bottom = std::max(bottom, last * s.sh + ty + 1);
        }
    }
    if (top > bottom) top = bottom = 0;
    Packed x{top, bottom - top, left, right - left, s.sw, C % BLOCK == 0, nullptr};
    x.data = scratch(PACKED, Packed::floats(x.rows, x.columns, s.sw, C));
    x.fill(s.in + (size_t)b * s.H * s.W * s.C + group * C, s.H, s.W, s.C, C);
    Tile tile{};
    tile.blocks = x.blocked ? C / BLOCK : 1;
    tile.block = x.plane() * BLOCK;
    tile.step = (size_t)s.ow * s.F;
    tile.floor = s.epilogue.floor();
    std::vector<const float*> taps;
    for (const Phase& p : s.phases) {
      // Where each tap's number of output (first, p.v) lies; of planes, each channel's of each tap.
      const int planes = x.blocked ? 1 : C, first = std::max(a, p.u), end = std::min(z, p.u_end);
      taps.clear();
      for (size_t t = 0; t < p.taps.size(); t++)
        for (int c = 0; c < planes && first < end; c++)
          taps.push_back(x.data + c * x.plane() + x.at(first * s.sh + p.ty[t], p.v * s.sw + p.tx[t]));
      tile.taps = taps.data();
      tile.count = taps.size();
      const int wide = p.v_end - p.v, tiles = ceil_div(wide, LONGEST[nv]);
      for (int panel = share(panels, cut, cuts); panel < (int)share(panels, cut + 1, cuts); panel++) {
        const int f = group * F + panel * width;
        tile.w = p.w + (size_t)(group * panels + panel) * width * C * p.taps.size();
        tile.filters = F - panel * width;
        tile.bias = s.epilogue.bias ? s.epilogue.bias + f : nullptr;
        for (int i = first; i < end; i++) {
          const size_t row = (size_t)(i - first) * s.sh * s.sw * x.width();
          float* out = s.out + (((size_t)b * s.OH + i * s.oh + p.i) * s.OW + p.v * s.ow + p.j) * s.F + f;
          for (int k = 0; k < tiles; k++) {
            const int from = share(wide, k, tiles), to = share(wide, k + 1, tiles);
            tile.at = (row + from) * x.step();
            tile.out = out + from * tile.step;
            run_tile(to - from, nv, x.blocked, tile);
          }
        }
      }
    }
  });
}

static void forward(const Pool& pool, const Geometry& g, const float* x, const float* k, float* y,
                    Epilogue epilogue = {}) {
  Sum s{x, g.B, g.H, g.W, g.C, y, g.OH, g.OW, g.F, g.groups, g.sh, g.sw, 1, 1, epilogue, {}};
  Phase all{0, g.OH, 0, g.OW, 0, 0, {}, {}, {}};
  for (int p = 0; p < g.KH; p++)
    for (int q = 0; q < g.KW; q++) {
      all.taps.push_back(p * g.KW + q);
      all.ty.push_back(p * g.dh - g.ph);
      all.tx.push_back(q * g.dw - g.pw);
    }
  s.phases.push_back(all);
  sum_over_taps(pool, s, k, false);
}

static void input_gradient(const Pool& pool, const Geometry& g, const float* dy, const float* k, float* dx) {
  Sum s{dy, g.B, g.OH, g.OW, g.F, dx, g.H, g.W, g.C, g.groups, 1, 1, g.sh, g.sw, {}, {}};
  for (int r = 0; r < g.sh; r++)
    for (int m = 0; m < g.sw; m++) {
      // Pixels (u·sh + r − ph, v·sw + m − pw) of the image: tap (p, q) of window (u', v') covers
      // them where u'·sh + p·dh = u·sh + r.
      Phase phase{ceil_div(g.ph - r, g.sh), ceil_div(g.H + g.ph - r, g.sh),
                  ceil_div(g.pw - m, g.sw), ceil_div(g.W + g.pw - m, g.sw), r - g.ph, m - g.pw, {}, {}, {}};
      for (int p = 0; p < g.KH; p++)
        for (int q = 0; q < g.KW; q++)
          if (p * g.dh % g.sh == r && q * g.dw % g.sw == m) {
            phase.taps.push_back(p * g.KW + q);
            phase.ty.push_back((r - p * g.dh) / g.sh);
            phase.tx.push_back((m - q * g.dw) / g.sw);
          }
      if (phase.u < phase.u_end && phase.v < phase.v_end) s.phases.push_back(phase);
    }
  sum_over_taps(pool, s, k, true);
}

// Vectors, threads and working memory.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#define INLINE inline __attribute__((always_inline))
#define KERNEL static __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 32")

// A vector is VL floats. A tile of P broadcast numbers times NV vectors keeps P·NV sums in
// registers, besides NV vectors of weights and one spare: 14·2 + 2 of AVX-512's 32 registers,
// 6·2 + 2 of AVX2's 16. With one vector a tile is as long as the latency of 4 cycles wants.
#if defined(__AVX512F__)
constexpr int VL = 16, LONGEST[3] = {0, 16, 14};
#else
constexpr int VL = 8, LONGEST[3] = {0, 12, 6};
#endif
constexpr int BLOCK = 16;  // channels that lie together in packed images, on every machine

typedef float vec __attribute__((vector_size(4 * VL), aligned(4), may_alias));

static INLINE vec load(const float* p) { return *(const vec*)p; }
static INLINE void store(float* p, vec v) { *(vec*)p = v; }
static INLINE vec load(const float* p, int n) {  // the first n, then zeros
  if (n >= VL) return load(p);
  vec v = {};
  if (n > 0) memcpy(&v, p, 4 * n);
  return v;
}
KERNEL void store_part(float* p, vec v, int n) { memcpy(p, &v, 4 * n); }  // apart, since rare
static INLINE void store(float* p, vec v, int n) {
  if (n >= VL) store(p, v);
  else if (n > 0) store_part(p, v, n);
}
static INLINE vec at_least(vec floor, vec v) { return v < floor ? floor : v; }  // NaN stays

static int ceil_div(int a, int b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }  // b > 0
static size_t share(size_t whole, int part, int parts) { return whole * part / parts; }

// While it lives, numbers below 1e-38 count as 0, on every thread: they take a hundred times as long.
struct FlushDenormals {
#if defined(__SSE__)
  const unsigned before = __builtin_ia32_stmxcsr();
  FlushDenormals() { __builtin_ia32_ldmxcsr(before | 0x8040); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(before); }
#endif
};

// Runs tasks on the threads of XLA's pool; the caller works, too, so that a busy pool only makes
// it slower. Who cuts the work never asks how many threads there are: sums are added in one
// order, and their bits do not depend on the threads.
class Pool {
 public:
  Pool(int threads, std::function<void(std::function<void()>)> schedule)
      : threads_(threads), schedule_(std::move(schedule)) {}

  void run(int tasks, const std::function<void(int)>& task) const {
    const int helpers = std::min(threads_, tasks) - 1;
    if (helpers <= 0) {
      const FlushDenormals flush;
      for (int i = 0; i < tasks; i++) task(i);
      return;
    }
    struct Shared {
      std::atomic<int> next{0}, done{0};
    };
    auto shared = std::make_shared<Shared>();  // a helper that comes too late still reads it
    auto work = [shared, tasks, &task] {
      const FlushDenormals flush;
      for (int i; (i = shared->next.fetch_add(1)) < tasks; shared->done.fetch_add(1)) task(i);
    };
    for (int i = 0; i < helpers; i++) schedule_(work);
    work();
    for (int spins = 0; shared->done.load() < tasks; spins++) {
#if defined(__x86_64__)
      if (spins < 4096) {
        __builtin_ia32_pause();
        continue;
      }
#endif
      std::this_thread::yield();
    }
  }

 private:
  int threads_;
  std::function<void(std::function<void()>)> schedule_;
};

// Working memory of this thread, kept from call to call: one piece for each use.
enum Use { PACKED, GRADIENT, PANELS, PARTS, TRANSFORMED, PRODUCTS, KERNELS, USES };
static float* scratch(Use use, size_t floats) {
  struct Piece {
    float* data = nullptr;
    size_t size = 0;
    ~Piece() { free(data); }
  };
  static thread_local Piece pieces[USES];
  Piece& piece = pieces[use];
  if (piece.size < floats) {
    free(piece.data);
    piece.size = 0;
    const size_t size = (floats + VL + 1023) / 1024 * 1024;
    piece.data = (float*)aligned_alloc(64, 4 * size);
    if (!piece.data) throw std::bad_alloc();
    piece.size = size;
  }
  return piece.data;
}

struct Geometry {  // of a convolution; ph and pw are the zeros before the image, negative to crop
  int B, H, W, C, KH, KW, F, OH, OW, sh, sw, ph, pw, dh, dw, groups;
};
struct Epilogue {  // what becomes of a sum before it is stored
  const float* bias = nullptr;
  bool relu = false;
  vec floor() const { return vec{} + (relu ? 0.f : -__builtin_inff()); }
};

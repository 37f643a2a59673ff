"""The check of a library, run as a program of its own: `python check.py LIBRARY`.

It compares the three products of a convolution with NumPy's in float64, called directly and by
XLA. A wrong one ends it with an error; so does a library that cannot run here.
"""

import ctypes
import sys
from itertools import product

import numpy as np

# B, H, W, C, KH, KW, F, strides, padding before and after (rows, columns), dilations, groups
CASES = (
    (2, 12, 11, 16, 3, 3, 32, (1, 1), (1, 1, 1, 1), (1, 1), 1),
    (2, 11, 13, 3, 7, 7, 16, (2, 2), (0, 0, 0, 0), (1, 1), 1),
    (3, 9, 9, 32, 3, 3, 64, (2, 2), (0, 1, 0, 1), (1, 1), 1),
    (1, 8, 7, 5, 3, 2, 10, (1, 3), (2, 0, 1, 2), (2, 1), 1),
    (2, 8, 8, 1, 3, 3, 33, (1, 1), (1, 1, 1, 1), (1, 1), 1),
    (2, 7, 9, 24, 3, 3, 24, (2, 1), (1, 1, 1, 1), (1, 1), 24),
    (2, 7, 9, 32, 3, 3, 8, (1, 1), (1, 1, 1, 1), (1, 2), 2),
)
TOLERANCES = {False: 1e-5, True: 1e-4}  # of the largest number; Winograd's form


def geometry(case):
    """The library's sixteen numbers."""
    b, h, w, c, kh, kw, f, (sh, sw), (top, bottom, left, right), (dh, dw), groups = case
    oh = (h + top + bottom - (kh - 1) * dh - 1) // sh + 1
    ow = (w + left + right - (kw - 1) * dw - 1) // sw + 1
    return b, h, w, c, kh, kw, f, oh, ow, sh, sw, top, left, dh, dw, groups


def draw(g, seed=0):
    """An image, a kernel and an output's gradient, in float32."""
    b, h, w, c, kh, kw, f, oh, ow = g[:9]
    generator = np.random.default_rng(seed)
    shapes = (b, h, w, c), (kh, kw, c // g[-1], f), (b, oh, ow, f)
    return [generator.standard_normal(shape, np.float32) for shape in shapes]


def exact(g, x, k, dy):
    """The convolution and its two gradients, in float64."""
    b, h, w, c, kh, kw, f, oh, ow, sh, sw, top, left, dh, dw, groups = g
    x, k, dy = (array.astype(np.float64) for array in (x, k, dy))
    # Zeros around, as many as the window may reach, also for padding that crops.
    rows, columns = (oh - 1) * sh + (kh - 1) * dh + 1, (ow - 1) * sw + (kw - 1) * dw + 1
    low, left_of = max(top, 0), max(left, 0)
    padded = np.zeros((b, low + max(h, rows - top), left_of + max(w, columns - left), c))
    inside = np.s_[:, low : low + h, left_of : left_of + w]
    padded[inside] = x
    y, dx, dk = np.zeros_like(dy), np.zeros_like(padded), np.zeros_like(k)
    for p, q, n in product(range(kh), range(kw), range(groups)):
        i, j = low - top + p * dh, left_of - left + q * dw
        ins, outs = (slice(n * m // groups, (n + 1) * m // groups) for m in (c, f))
        patch = np.s_[:, i : i + (oh - 1) * sh + 1 : sh, j : j + (ow - 1) * sw + 1 : sw, ins]
        y[..., outs] += padded[patch] @ k[p, q, :, outs]
        dx[patch] += dy[..., outs] @ k[p, q, :, outs].T
        dk[p, q, :, outs] = np.tensordot(padded[patch], dy[..., outs], ((0, 1, 2), (0, 1, 2)))
    return y, dx[inside], dk


def products(library, g, x, k, dy, winograd=False, threads=2):
    """The same by the library, in float32."""
    floats = ctypes.POINTER(ctypes.c_float)
    results = []
    for number, (a, b, like) in enumerate(((x, k, dy), (dy, k, x), (x, dy, k))):
        out = np.full_like(like, np.nan)
        pointers = [array.ctypes.data_as(floats) for array in (a, b, out)]
        library.convolve(number, (ctypes.c_int * 16)(*g), winograd, threads, *pointers)
        results.append(out)
    return results


def called_by_xla(library):
    """The error of a convolution that XLA calls, relative to its largest number."""
    import jax

    jax.ffi.register_ffi_target('checked', jax.ffi.pycapsule(library.conv), platform='cpu')
    g = geometry(CASES[0])
    x, k, dy = draw(g)
    shape = jax.ShapeDtypeStruct(dy.shape, np.float32)
    call = jax.ffi.ffi_call('checked', shape)
    y = jax.jit(lambda x, k: call(x, k, window=np.array(g[9:]), winograd=False))(x, k)
    expected = exact(g, x, k, dy)[0]
    return np.max(abs(np.asarray(y) - expected)) / np.max(abs(expected))


def main(path):
    """Check the library in a file."""
    library = ctypes.CDLL(path)
    for case, winograd in product(CASES, (False, True)):
        g = geometry(case)
        x, k, dy = draw(g)
        results = products(library, g, x, k, dy, winograd)
        for found, right in zip(results, exact(g, x, k, dy)):
            error = np.max(abs(found - right)) / np.max(abs(right))
            if not error <= TOLERANCES[winograd]:
                sys.exit(f'wrong by {error:.1e} of the largest number for {case}')
    if not called_by_xla(library) <= TOLERANCES[False]:
        sys.exit('wrong when XLA calls it')


if __name__ == '__main__':
    main(sys.argv[1])

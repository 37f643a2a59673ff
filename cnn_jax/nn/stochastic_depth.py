"""Dropout of residual branches: networks of random depth."""

from jaxtyping import Array, Float, Key

from cnn_jax.nn.drop import dropout


def stochastic_depth(
    key: Key[Array, ''], x: Float[Array, 'b ...'], rate: float | Float[Array, '']
) -> Float[Array, 'b ...']:
    """Sets the branch x of each example to zero with probability r, divides the others by 1 − r.

    y[b] = x[b] · m[b] / (1 − r), m ~ Bernoulli(1 − r); the layer's output is shortcut + y.

    Huang et al. do not divide in training and multiply by 1 − r at inference. Divided, the branch
    has the same mean in training and inference needs no rate; the two are the same but for the
    scale in which the branch's last layer learns. Arguments and exactness as in `dropout`.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth".
    """
    return dropout(key, x, rate, (x.shape[0], *(1,) * (x.ndim - 1)))


def depth_rate(rate: float | Float[Array, ''], number: int, count: int) -> float | Float[Array, '']:
    """The rate of branch `number` of `count`, from 1: r_l = r · l / L.

    Source: Huang et al. 2016, equation 4, with r = 1 − p_L.
    """
    return rate * (number / count)

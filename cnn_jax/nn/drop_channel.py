"""Dropout of whole feature maps."""

from jaxtyping import Array, Float, Key

from cnn_jax.nn.drop import dropout


def channel_dropout(
    key: Key[Array, ''], x: Float[Array, 'b ... c'], rate: float | Float[Array, '']
) -> Float[Array, 'b ... c']:
    """Sets each channel of each example to zero with probability r, divides the others by 1 − r.

    y[b,…,c] = x[b,…,c] · m[b,c] / (1 − r), m ~ Bernoulli(1 − r)

    Neighbouring pixels are alike, so that dropping them one by one removes little; a channel goes
    as a whole. Arguments and exactness as in `dropout`.

    Source: Tompson et al. 2015, "Efficient Object Localization Using Convolutional Networks",
    where it is called spatial dropout.
    """
    shape = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
    return dropout(key, x, rate, shape)

"""Compiled as one program, a net gives what it gives operation by operation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from cnn_jax.config import Model, fields_by_path
from cnn_jax.errors import UserError
from cnn_jax.models import StridedNet
from cnn_jax.regularizers import cross_entropy, log_probabilities

BATCH, SIZE, CHANNELS, CLASSES = 4, 8, 4, 4


CHOICES = {
    path: st.sampled_from(field.metadata['choices'])
    for path, field in fields_by_path(Model()).items()
    if field.metadata.get('choices') and path not in ('name', 'dtype')
}
# Each operation is compiled for each shape that it meets: few shapes, so that it takes seconds.
models = st.builds(
    Model,
    stem_width=st.sampled_from([0, 4]),
    stem_kernel=st.integers(1, 3),
    stem_stride=st.integers(1, 2),
    widths=st.sampled_from([(4,), (4, 4)]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    norm_momentum=st.floats(0, 1),
    norm_groups=st.just(2),
    ghost_batch=st.just(2),
    weight_standardization=st.booleans(),
    drop_block=st.integers(1, 3),
    input_noise=st.floats(0, 1),
    dropout=st.floats(0, 0.9),
    hidden=st.sampled_from([(), (4,)]),
    head_dropout=st.floats(0, 0.9),
    **CHOICES,
)


def outcome(net, variables, x, labels):
    """Logits in inference and in training, the new batch statistics, and the gradient."""

    def loss(params):
        logits, updated = net.apply(
            variables | {'params': params},
            x,
            train=True,
            rngs={'dropout': jax.random.key(1)},
            mutable='batch_stats',
        )
        return cross_entropy(log_probabilities(logits), labels).mean(), (logits, updated)

    gradient, trained = jax.grad(loss, has_aux=True)(variables['params'])
    return net.apply(variables, x, train=False), trained, gradient


@settings(max_examples=4, deadline=None, derandomize=True)
@given(model=models)
def test_jit_and_eager_agree(model):
    net, draw = StridedNet(model, CLASSES), np.random.default_rng(0)
    x = draw.normal(size=(BATCH, SIZE, SIZE, CHANNELS)).astype(np.float32)
    labels = draw.integers(0, CLASSES, BATCH).astype(np.int32)
    try:
        shapes = jax.eval_shape(functools.partial(net.init, train=False), jax.random.key(0), x)
    except UserError:  # a kernel larger than its input
        reject()
    variables = jax.tree.map(lambda s: draw.uniform(-0.5, 0.5, s.shape).astype(s.dtype), shapes)
    statistics = variables.get('batch_stats', {})
    variables['batch_stats'] = jax.tree.map(abs, statistics)  # no variance is negative

    compiled = jax.jit(functools.partial(outcome, net))(variables, x, labels)
    with jax.disable_jit():
        eager = outcome(net, variables, x, labels)

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest)

    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(eager))
    jax.tree.map(close, compiled, eager)

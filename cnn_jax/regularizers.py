"""Task losses and regularizers: everything that a training step minimizes.

A `Regularizer` is one object: the config field that holds its strength, and a function of the
strength and of a `Context`, which shows it the parameters, where they started, the activations,
the prediction and the batch. To add one, write its function here, its line in `REGULARIZERS`, its
field in `config.Loss` and its test. An experiment file may bring its own list `REGULARIZERS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from cnn_jax.components import blamed_on
from cnn_jax.config import Config, fields_by_path, get, is_on
from cnn_jax.errors import UserError
from cnn_jax.packing import joined
from cnn_jax.params import Flat

Term = Float[Array, ''] | Float[Array, ' b']


@dataclass(frozen=True)
class Context:
    """Everything that a regularizer may look at in a training step."""

    config: Config  # its numbers perhaps traced
    params: Flat  # by path those that it acts on: trained, and matching its patterns
    initial: Flat  # the same as their training began; only where `needs_initial`
    # Where `needs_activations`: by path of the layers that match, their outputs, one for each call.
    activations: Mapping[str, tuple[Any, ...]]
    log_probs: Float[Array, 'b k']  # log class probabilities
    batch: Mapping[str, Any]  # `image` (prepared, or cached features), `label`, `index`, `mask`
    # Another pass of the network in training: `forward(images)` with the same dropout mask,
    # `forward(images, mask=1)` with another one; returns log class probabilities.
    forward: Callable[..., Float[Array, 'b k']]


@dataclass(frozen=True)
class Regularizer:
    """A term of what a training step minimizes.

    >>> Regularizer('loss.own', lambda strength, c: strength * jnp.mean(jnp.exp(c.log_probs) ** 2))
    ... # doctest: +ELLIPSIS
    Regularizer(field='loss.own', ...
    """

    field: str  # of the strength, e.g. `loss.l2`; with strength 0 it is not compiled in
    # `(strength, context) -> a scalar`, added to the mean loss; or one number an example, added to
    # its loss.
    term: Callable[[Any, Context], Term]
    on: str = ''  # the field with the patterns of what it acts on; '': all parameters
    _: KW_ONLY
    needs_initial: bool = False  # the state must keep the weights that training began with
    needs_activations: bool = False  # it looks at outputs of layers, which `on` then names
    needs_images: bool = False  # it cannot do with a frozen backbone's features

    def __post_init__(self) -> None:
        strength, acted_on = (get(Config(), each) for each in (self.field, self.on or 'loss.l2_on'))
        if not isinstance(strength, (int, float)) or not callable(self.term):
            raise UserError(f'Regularizer({self.field!r}, …) needs a field of a number and a term')
        if not isinstance(acted_on, tuple):
            raise UserError(f'Regularizer(on={self.on!r}): that field holds no patterns of names')

    def is_on(self, config: Config) -> bool:
        """Return whether it is compiled in; a strength that is not optional always is."""
        always = not fields_by_path(config)[self.field].metadata.get('optional')
        return always or is_on(get(config, self.field))


def log_probabilities(logits: Float[Array, 'b o']) -> Float[Array, 'b k']:
    """Log class probabilities: log-softmax, or both sides of a sigmoid for a single output.

    o = 1: [log σ(−z), log σ(z)];   o > 1: z − log Σ exp z

    Returns:
        float32; K = 2 classes for one output, else K = o.
    """
    logits = logits.astype(jnp.float32)
    if logits.shape[-1] == 1:
        return jax.nn.log_sigmoid(jnp.concatenate([-logits, logits], axis=-1))
    return jax.nn.log_softmax(logits)


def cross_entropy(
    log_probs: Float[Array, 'b k'],
    labels: Int[Array, ' b'],
    smoothing: float | Array = 0.0,
    focal: float | Array = 0.0,
) -> Float[Array, ' b']:
    """Cross-entropy of each example against its smoothed label, or the focal loss.

    ℓ = −(1 − ε)·f[y] − (ε/K)·Σ_k f[k],  f[k] = (1 − p[k])^γ·log p[k]

    With K = 2 from one sigmoid this is the binary cross-entropy.

    Args:
        log_probs: Log class probabilities.
        labels: Class numbers in [0, K).
        smoothing: ε in [0, 1]; may be traced.
        focal: γ; 0 for the cross-entropy, else perhaps traced.

    Returns:
        One loss an example, in nats.

    Source: Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7; Lin et al.
        2017, "Focal Loss for Dense Object Detection", equation 4.
    """
    if is_on(focal):
        rest = -jnp.expm1(log_probs)  # 1 − p, whose power has no derivative at 0
        power = jnp.where(rest > 0, jnp.where(rest > 0, rest, 1.0) ** focal, 0.0)
        log_probs = power * log_probs
    # A sum, since the gradient of an indexed read is a scatter: on a GPU a sort and more kernels.
    is_label = labels[:, None] == jnp.arange(log_probs.shape[-1])
    true = jnp.sum(jnp.where(is_label, log_probs, 0.0), axis=-1)
    return -(1.0 - smoothing) * true - smoothing * log_probs.mean(axis=-1)


def example_losses(
    config: Config, log_probs: Float[Array, 'b k'], batch: Mapping[str, Any]
) -> Float[Array, ' b']:
    """The task loss of each example.

    ℓ = λ·w·CE(label) + (1 − λ)·w'·CE(other label) where images were mixed, else w·CE(label)

    w is the batch's `weight`, of the label's class, where classes have one. The batch's mean is
    over the number of examples, as in Keras, not over their weights.
    """

    def loss(which: str) -> Float[Array, ' b']:
        strengths = config.loss.label_smoothing, config.loss.focal
        each = cross_entropy(log_probs, batch[f'{which}label'], *strengths)
        return each * batch[f'{which}weight'] if 'weight' in batch else each

    if 'share' not in batch:
        return loss('')
    return batch['share'] * loss('') + (1 - batch['share']) * loss('other_')


def class_weights(asked: str, counts: Int[np.ndarray, ' k'], names: Sequence[str]) -> list[float]:
    """The weights of the classes in the loss; [] where all are 1.

    balanced: w[c] = n / (K·n[c]), n[c] of n images, K classes with any; their mean over images is 1

    Args:
        asked: `config.loss.class_weights`: balanced, numbers, or '' for none.
        counts, names: The number of images of each class in the training split; its name.

    Errors:
        UserError: They are not numbers of at least 0, one a class.

    Source: King & Zeng 2001, "Logistic Regression in Rare Events Data", section 4.
    """
    weights = np.ones(len(names))
    if asked == 'balanced':
        there = counts > 0
        weights[there] = counts.sum() / (there.sum() * counts[there])
    elif asked:
        try:
            weights = np.array([float(each) for each in asked.strip('()[] ').split(',')])
        except ValueError:
            weights = np.empty(0)
        if len(weights) != len(names) or not (np.isfinite(weights) & (weights >= 0)).all():
            raise UserError(
                f'config.loss.class_weights is {asked!r}; it can be balanced, or {len(names)} '
                f'numbers of at least 0 in the order of the classes ({", ".join(names[:5])}'
                f'{", …" if len(names) > 5 else ""})'
            )
    return [] if (weights == 1).all() else weights.tolist()


def confidence_penalty(strength: float | Array, context: Context) -> Float[Array, ' b']:
    """The cost of a confident prediction of each example, whatever its label.

    −β·H(p) = β·Σ_k p[k]·log p[k],  from −β·log K (uniform) to 0 (certain), in nats

    Source: Pereyra et al. 2017, "Regularizing Neural Networks by Penalizing Confident Output
        Distributions", equation 2.
    """
    log_probs = context.log_probs
    return strength * jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def l2(strength: float | Array, context: Context) -> Float[Array, '']:
    """Keras's L2 penalty, λ · Σ w².

    Its gradient is 2λw. Under plain SGD it equals decoupled decay with `weight_decay` = 2λ; under
    Adam it does not, since the gradient is rescaled (Loshchilov & Hutter 2019).
    """
    return strength * _sum_squares(context.params.values())


def l1(strength: float | Array, context: Context) -> Float[Array, '']:
    """Lasso, λ · Σ |w|, with gradient λ·sign(w), 0 at w = 0; with `l2` the elastic net.

    Source: Tibshirani 1996, "Regression Shrinkage and Selection via the Lasso"; Zou & Hastie 2005,
        "Regularization and Variable Selection via the Elastic Net".
    """
    return strength * _total(_magnitude(leaf) for leaf in context.params.values())


def orthogonality(strength: float | Array, context: Context) -> Float[Array, '']:
    """Soft orthogonality: the filters of a layer as unit vectors at right angles to each other.

    λ · Σ ‖WᵀW − I‖²_F,  W the kernel as a matrix [inputs, outputs]

    With more outputs than inputs WᵀW cannot be I; WWᵀ − I is taken, whose squared norm differs
    from that of WᵀW − I by the constant outputs − inputs: the gradient, 4λ·W(WᵀW − I), is the same.
    Parameters with one axis, such as biases, cost 0.

    Source: Bansal, Chen & Wang 2018, "Can We Gain More from Orthogonality Regularizations in
        Training Deep CNNs?", equation 1.
    """

    def deviation(kernel: Array) -> Array:
        matrix = kernel.astype(jnp.float32).reshape(-1, kernel.shape[-1])
        if matrix.shape[0] < matrix.shape[1]:
            matrix = matrix.T
        return jnp.sum(jnp.square(matrix.T @ matrix - jnp.eye(matrix.shape[1])))

    return strength * _total(deviation(leaf) for leaf in context.params.values() if leaf.ndim > 1)


def l2_sp(strength: float | Array, context: Context) -> Float[Array, '']:
    """L2 toward the starting point, for fine-tuning: what was learned before is kept.

    λ · Σ (w − w⁰)²,  w⁰ the weights when their training began

    The paper's second term, plain L2 of the new head, is `l2` with its own patterns.

    Source: Li, Grandvalet & Davoine 2018, "Explicit Inductive Bias for Transfer Learning with
        Convolutional Networks", equation 2; its α/2 is λ.
    """
    return strength * _sum_squares(w - context.initial[p] for p, w in context.params.items())


def activity_l1(strength: float | Array, context: Context) -> Float[Array, '']:
    """Keras's activity regularizer: an L1 penalty on the outputs of layers.

    λ · Σ_layers Σ |a|, a the outputs for one example, averaged over the batch

    The output is that of the module: of a convolution or Dense layer, before its activation.

    Source: Glorot, Bordes & Bengio 2011, "Deep Sparse Rectifier Neural Networks", section 3.
    """
    size = context.log_probs.shape[0]
    return strength * _total(_magnitude(a) / size for a in jax.tree.leaves(context.activations))


def input_gradient(strength: float | Array, context: Context) -> Float[Array, '']:
    """Double backpropagation: the loss shall not change quickly with the input.

    λ · mean over the batch of ‖∂ℓ/∂x‖²,  ℓ the example's task loss, x its prepared image

    Source: Drucker & LeCun 1992, "Improving Generalization Performance Using Double
        Backpropagation", who sum half of it.
    """
    batch = context.batch

    def loss(images: Array) -> Array:
        return jnp.sum(example_losses(context.config, context.forward(images), batch))

    gradients = jax.grad(loss)(batch['image'])
    return strength * _sum_squares([gradients]) / gradients.shape[0]


def r_drop(strength: float | Array, context: Context) -> Float[Array, ' b']:
    """R-Drop: two passes with different dropout masks shall predict the same.

    ½·(ℓ₁ + ℓ₂) + (α/4)·(KL(p₁‖p₂) + KL(p₂‖p₁)) in place of ℓ₁

    This is half of the paper's objective, so that α → 0 leaves the scale of the loss as it is.

    Returns:
        The difference to ℓ₁, for each example.

    Source: Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks", equation 4.
    """
    first, second = context.log_probs, context.forward(context.batch['image'], mask=1)
    divergence = jnp.sum((jnp.exp(first) - jnp.exp(second)) * (first - second), axis=-1)
    of_first, of_second = (
        example_losses(context.config, log_probs, context.batch) for log_probs in (first, second)
    )
    return 0.5 * (of_second - of_first) + 0.25 * strength * divergence


REGULARIZERS = (
    Regularizer('loss.confidence_penalty', confidence_penalty),
    Regularizer('loss.l2', l2, 'loss.l2_on'),
    Regularizer('loss.l1', l1, 'loss.l1_on'),
    Regularizer('loss.orthogonality', orthogonality, 'loss.orthogonality_on'),
    Regularizer('loss.l2_sp', l2_sp, 'loss.l2_sp_on', needs_initial=True),
    Regularizer('loss.activity_l1', activity_l1, 'loss.activity_l1_on', needs_activations=True),
    Regularizer('loss.input_gradient', input_gradient, needs_images=True),
    Regularizer('loss.r_drop', r_drop),
)


def add_terms(
    regularizers: Sequence[Regularizer],
    context: Callable[[Regularizer], Context],
    each: Float[Array, ' b'],
) -> tuple[Float[Array, ' b'], Float[Array, '']]:
    """Add up what the regularizers that are on cost.

    Args:
        regularizers, context: The regularizers, and a function to the context of each.
        each: Task loss of each example.

    Returns:
        The loss of each example with what regularizes it, and the sum of all other terms.
    """
    total = jnp.zeros((), jnp.float32)
    for regularizer in regularizers:
        seen = context(regularizer)
        own = f'your own regularizer of {regularizer.field}'
        with blamed_on(None if regularizer in REGULARIZERS else own):
            term = jnp.asarray(regularizer.term(get(seen.config, regularizer.field), seen))
            if term.shape not in ((), each.shape) or jnp.iscomplexobj(term):
                raise UserError(
                    f'its term is {term.dtype} {list(term.shape)}; it must be a real number, or '
                    'one an example'
                )
        if term.ndim:
            each = each + term
        else:
            total = total + term
    return each, total


def _magnitude(leaf: Array) -> Array:
    """Σ|w|, with the gradient sign(w): that of `jnp.abs` is 1 at 0."""
    leaf = leaf.astype(jnp.float32)
    return jnp.sum(leaf * lax.stop_gradient(jnp.sign(leaf)))


def _sum_squares(leaves: Any) -> Array:
    return _squares([leaf.astype(jnp.float32) for leaf in leaves])


@jax.custom_jvp
def _squares(leaves: list[Array]) -> Array:
    return _total(jnp.sum(jnp.square(leaf)) for leaf in joined(leaves))


@_squares.defjvp
def _squares_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    # Leaf by leaf, so that the gradient, 2w, joins what else is added to that of a leaf.
    (leaves,), (changes,) = primals, tangents
    return _squares(leaves), _total(jnp.sum(2 * w * dw) for w, dw in zip(leaves, changes))


def _total(terms: Any) -> Array:
    return sum(terms, start=jnp.zeros((), jnp.float32))

"""What the ablations start from: the small net without regularization on 500 MNIST digits.

python -m launch.train --config=experiments/baseline.py --workdir=runs/baseline
"""

from cnn_jax.config import Config, Data, Model, Optimizer, Train


def get_config() -> Config:
    return Config(
        model=Model(
            stem_width=0,
            widths=(32, 64),
            hidden=(128,),
            norm='none',
            # For the arms with batch norm: of Keras's 0.99, 13% of the running averages' initial
            # values would be left after the 200 steps.
            norm_momentum=0.9,
            head_norm='none',
            dropout=0.0,
            head_dropout=0.0,
        ),
        data=Data(source='mnist_5k', train='train[:500]', batch=50),
        optimizer=Optimizer(learning_rate=1e-3, schedule='cosine'),
        train=Train(epochs=20),
    )

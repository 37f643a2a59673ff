"""What the ablations start from: the small net without regularization on 500 MNIST digits.

python -m launch.train --config=experiments/baseline.py --workdir=runs/baseline
"""

from cnn_jax.config import Config, Data, Model, Optimizer, Train


def get_config() -> Config:
    return Config(
        model=Model(
            stem_width=0,
            widths=(16, 32),
            hidden=(128,),
            norm='none',
            # For the arms with batch norm: of Keras's 0.99, 13% of the running averages' initial
            # values would be left after the 200 steps.
            norm_momentum=0.9,
            head_norm='none',
            dropout=0.0,
            head_dropout=0.0,
        ),
        # A seed draws 500 of 2,000 digits; 500 are held out to tune by, 2,500 to test on.
        data=Data(
            source='mnist_5k',
            train='all[:2500]',
            eval='all[2500:]',
            subset=500,
            validation=500,
            batch=50,
            eval_batch=500,
        ),
        optimizer=Optimizer(learning_rate=1e-3, schedule='cosine'),
        train=Train(epochs=20),
    )

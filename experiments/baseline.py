"""What the ablations start from: a small net without regularization on 500 MNIST digits.

Each seed draws its 500 digits, 50 of each, from 2,000; 500 others are held out to tune by and 2,500
to test on. Every arm's learning rate is tuned.

  python -m launch.train --config=experiments/baseline.py --workdir=runs/baseline
"""

from cnn_jax.ablation import log
from cnn_jax.config import Config, Data, Model, Optimizer, Train

TUNE = {'optimizer.learning_rate': log(1e-4, 1e-1)}
# With Keras's 0.99, the running averages would still be 13% their initial values after 200 steps.
MOMENTUM = {'model.norm_momentum': 0.9}
BATCH_NORM = {'model.norm': 'batch', 'model.head_norm': 'batch'} | MOMENTUM


def get_config() -> Config:
    return Config(
        model=Model(
            stem_width=0,
            widths=(16, 32),
            hidden=(128,),
            norm='none',
            head_norm='none',
            dropout=0.0,
            head_dropout=0.0,
        ),
        data=Data(
            source='mnist_5k',
            train='all[:2500]',
            eval='all[2500:]',
            subset=500,
            validation=500,
            batch=50,
            eval_batch=500,
        ),
        optimizer=Optimizer(learning_rate=3e-3, schedule='cosine'),
        train=Train(epochs=20),
    )

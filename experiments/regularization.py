"""What does each regularizer buy when there are few images?

The small net on 500 MNIST digits, 50 of each: without any, with dropout (0.25 after each pair,
0.5 before the classifier), with batch normalization, with L2 5e-4 on the convolutions, with all.

  python -m launch.ablate --config=experiments/regularization.py --workdir=runs/regularization
"""

from cnn_jax.config import Config, Data, Model, Optimizer, Train

SEEDS = 5

DROPOUT = {'model.dropout': 0.25, 'model.head_dropout': 0.5}
BATCH_NORM = {'model.norm': 'batch', 'model.head_norm': 'batch'}
L2 = {'loss.l2': 5e-4}

ARMS = {
    'none': {},
    'dropout': DROPOUT,
    'batch norm': BATCH_NORM,
    'L2': L2,
    'all': DROPOUT | BATCH_NORM | L2,
}


def get_config() -> Config:
    return Config(
        model=Model(
            stem_width=0,
            widths=(32, 64),
            hidden=(128,),
            norm='none',
            head_norm='none',
            dropout=0.0,
            head_dropout=0.0,
        ),
        data=Data(source='mnist_5k', train='train[:500]', batch=50),
        optimizer=Optimizer(learning_rate=1e-3, schedule='cosine'),
        train=Train(epochs=20),
    )

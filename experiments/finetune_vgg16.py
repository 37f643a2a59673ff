"""VGG16 with frozen ImageNet convolutions and a new head, on your own photographs of two classes.

Flatten (25,088) → Dense 1024 ReLU → Dropout 0.5 → Dense 1 sigmoid, on block5_pool of 224×224×3
images; SGD 1e-3 with momentum 0.9, binary cross-entropy. Only the head is trained. For more than
two classes set --config.model.outputs=0.

This is the lecture's recipe. Its steps are too long for raw features (of norm 1,400): expect good
accuracy, but losses of several nats and probabilities near 0 and 1. finetune.py mends that.

  python -m launch.train --config=experiments/finetune_vgg16.py --workdir=runs/mine \\
      --config.data.source=folder:PATH
"""

from cnn_jax.config import Config, Data, Model, Optimizer, Train


def get_config() -> Config:
    return Config(
        model=Model(
            name='vgg16',
            weights='imagenet',
            outputs=1,
            hidden=(1024,),
            head_norm='none',
            head_dropout=0.5,
        ),
        data=Data(source='folder:photos', resize='stretch', size=224, channels=3),
        optimizer=Optimizer(name='sgd', learning_rate=1e-3, momentum=0.9),
        train=Train(epochs=10, checkpoint_every=5, frozen=('backbone/*',)),
    )

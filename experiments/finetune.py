"""A pretrained VGG16 on your own photographs: a new linear classifier on its frozen convolutions.

The features are averaged over each image and scaled to mean 0 and deviation 1. Learning rate and L2
are chosen by eight trial runs on the images of val/, or on 15% of train/ where there is none; the
images of test/ are left to launch.evaluate. Everything runs on cached features: about a second a
trial.

In five folds (benchmarks.fine_tuning), beside scikit-learn's tuned logistic regression on the same
features: 217 photographs of two classes, accuracy 94.5% (94.9%), loss 0.128 nats (0.128); 275 of
nine classes, 82.5% (81.1%), 0.577 (0.578). Stopping early by the few held-out images raised the
former loss to 0.148.

  python -m launch.train --config=experiments/finetune.py --workdir=runs/mine \\
      --config.data.source=folder:PATH
  python -m launch.evaluate --workdir=runs/mine
"""

from cnn_jax.ablation import log
from cnn_jax.config import Config, Data, Model, Optimizer, Train

# Wherever in these ranges a few dozen images put it, the classifier is a sound one.
TUNE = {'optimizer.learning_rate': log(3e-3, 3e-2), 'loss.l2': log(1e-2, 0.3)}


def get_config() -> Config:
    config = Config(
        model=Model(
            name='vgg16', weights='imagenet', pool='average', scale_features=True, hidden=()
        ),
        data=Data(source='folder:photos', resize='crop', size=224, channels=3, batch=32),
        optimizer=Optimizer(name='adam', schedule='cosine'),
        train=Train(epochs=30, trials=8, checkpoint_every=10, frozen=('backbone/*',), best='loss'),
    )
    config.data.validation_share = 0.15
    config.loss.l2_on = ('head/*/kernel',)
    return config

"""A pretrained VGG16 on your own photographs: a new linear classifier on its frozen convolutions.

The features are averaged over each image and scaled to mean 0 and deviation 1. Learning rate and L2
are chosen by eight trial runs on the images of val/, or on 15% of train/ where there is none; the
images of test/ are left to launch.evaluate. Everything runs on cached features: about a second a
trial.

In five folds (benchmarks/RESULTS.md), beside scikit-learn's tuned logistic regression on the same
features: 216 photographs of two classes, accuracy 96.8% (97.2%), loss 0.128 nats (0.138); 278 of
nine classes, 82.0% (82.0%), 0.574 (0.637); 2,624 of solar cells, 84.1% (84.1%), 0.362 (0.359);
1,000 garments, 83.3% (83.3%), 0.504 (0.504). With model.name=efficientnet_lite0: 96.3%, 85.6%,
85.5%, 87.0%.

  python -m launch.train --config=experiments/finetune.py --workdir=runs/mine \\
      --config.data.source=folder:PATH
  python -m launch.evaluate --workdir=runs/mine
"""

from cnn_jax.ablation import log
from cnn_jax.config import Config, Data, Model, Optimizer, Train

# Wherever in these ranges a few dozen images put it, the classifier is a sound one: with less L2,
# 138 photographs of nine classes once had twice the loss that was possible.
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

"""From stored images to what a set of pretrained weights was trained on."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


@dataclass(frozen=True)
class Preprocessing:
    """Pixel values as a network expects them: y = (x / divisor − mean) / std, per channel.

    Attributes:
        name: what it is called in files and messages.
        bgr: whether the network's first channel is blue; `mean` and `std` are in its order.
        divisor: 255 for networks that expect pixels in [0, 1], else 1.
        mean: subtracted, after the division.
        std: divided by, last.
    """

    name: str
    bgr: bool = False
    divisor: float = 1.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __call__(self, images: UInt8[Array, 'b h w c']) -> Float[Array, 'b h w 3']:
        """Preprocess a batch; works on NumPy and traced arrays alike.

        Args:
            images: RGB, or grey (`c` is 1, repeated to three channels), 0 to 255.

        Returns:
            float32, of the same height and width.
        """
        x = jnp.broadcast_to(jnp.asarray(images), (*images.shape[:-1], 3)).astype(jnp.float32)
        if self.bgr:
            x = x[..., ::-1]
        mean, std = jnp.asarray(self.mean, jnp.float32), jnp.asarray(self.std, jnp.float32)
        return (x / self.divisor - mean) / std


# Caffe's, with which Oxford trained VGG16: blue first, ImageNet's mean pixel subtracted.
CAFFE = Preprocessing('caffe', bgr=True, mean=(103.939, 116.779, 123.68))
# torchvision's: red first, ImageNet's mean and standard deviation of pixels in [0, 1].
TORCH = Preprocessing('torch', divisor=255.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
# Pixels in [0, 1] and nothing more.
PLAIN = Preprocessing('plain', divisor=255.0)

PREPROCESSINGS = {p.name: p for p in (CAFFE, TORCH, PLAIN)}

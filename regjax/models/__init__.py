"""Small standard networks for images, as flax nnx modules."""

from regjax.models._convnet import ConvNet as ConvNet
from regjax.models._mlp import MLP as MLP
from regjax.models._resnet import ResNet as ResNet

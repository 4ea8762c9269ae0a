"""Small standard networks for images and text, and diagonal linear networks, as nnx modules."""

from regjax.models import linen as linen
from regjax.models._convnet import ConvNet as ConvNet
from regjax.models._diagonal_linear import DiagonalLinear as DiagonalLinear
from regjax.models._diagonal_linear import EarlyStoppingResult as EarlyStoppingResult
from regjax.models._diagonal_linear import conserved_quantity as conserved_quantity
from regjax.models._diagonal_linear import diagonal_flow as diagonal_flow
from regjax.models._diagonal_linear import diagonal_weights as diagonal_weights
from regjax.models._diagonal_linear import early_stopping_window as early_stopping_window
from regjax.models._mlp import MLP as MLP
from regjax.models._resnet import ResNet as ResNet
from regjax.models._transformer import GPT as GPT

__all__ = [name for name in dir() if not name.startswith("_")]  # what help() lists

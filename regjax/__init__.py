"""Regularisation, normalization and the curvature of the loss, for JAX.

Functions are grouped by what they return; each group is a subpackage, loaded on first use:

    curvature        a matrix that is known by its products, or something spectral made from one
    transforms       an optax gradient transformation
    schedules        a schedule, or a rule for a learning rate
    regularizers     a scalar to add to a loss
    normalization    a Flax module, or the statistics that it computes
    initializers     initial parameters
    pruning          scores and masks of units, and networks without them
    diagnostics      a measurement, which never changes the model
    models           a small standard network, or one whose dynamics are known
    plots            a matplotlib figure
    experiments      data, a training run, a command

This level has the adapters (`from_nnx`, `from_linen`, `from_equinox`, `from_haiku`, `from_keras`),
which turn a model into a pure function, and a few declarations: how a loss averages over its
examples (`WeightedMean`, `assume_separable`), which parameters count (`subset`), and what the axes
of parameters mean (`Layout`).

The examples in the docstrings assume these lines:

    import jax, jax.numpy as jnp, numpy as np, optax, regjax
    from flax import linen, nnx
    from regjax import curvature, transforms  # and likewise the other subpackages
    np.set_printoptions(precision=3, suppress=True)
"""

import importlib as _importlib
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING

from regjax import typing as typing
from regjax._adapters import Model as Model
from regjax._adapters import from_callable as from_callable
from regjax._adapters import model_function as model_function
from regjax._adapters import model_loss as model_loss
from regjax._base import WeightedMean as WeightedMean
from regjax._base import couples_examples as couples_examples
from regjax._equinox import from_equinox as from_equinox
from regjax._files import CheckpointError as CheckpointError
from regjax._finite import NotFiniteError as NotFiniteError
from regjax._haiku import from_haiku as from_haiku
from regjax._keras import from_keras as from_keras
from regjax._layouts import Layout as Layout
from regjax._layouts import guess_layout as guess_layout
from regjax._linen import from_linen as from_linen
from regjax._loops import Interrupted as Interrupted
from regjax._losses import assume_separable as assume_separable
from regjax._losses import without_aux as without_aux
from regjax._nnx import from_nnx as from_nnx
from regjax._separable import check_separable as check_separable
from regjax._statistics import population_statistics as population_statistics
from regjax._statistics import updated_statistics as updated_statistics
from regjax._subsets import subset as subset

if TYPE_CHECKING:
    from regjax import curvature as curvature
    from regjax import diagnostics as diagnostics
    from regjax import initializers as initializers
    from regjax import normalization as normalization
    from regjax import pruning as pruning
    from regjax import regularizers as regularizers
    from regjax import schedules as schedules
    from regjax import transforms as transforms
del TYPE_CHECKING  # no name of ours

__version__ = "0.1.0"
__all__ = [name for name in dir() if not name.startswith("_")]  # what help() lists

_ROOMS = (
    *("curvature", "transforms", "schedules", "regularizers", "normalization", "initializers"),
    *("pruning", "diagnostics", "models", "plots", "experiments"),
)


def __getattr__(name: str) -> _ModuleType:
    if name in _ROOMS:
        return _importlib.import_module(f"regjax.{name}")
    raise AttributeError(f"module 'regjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])

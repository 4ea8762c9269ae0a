"""regjax: regularisation, normalization and the loss landscape in JAX."""

from regjax import curvature as curvature
from regjax import diagnostics as diagnostics
from regjax import initializers as initializers
from regjax import normalization as normalization
from regjax import pruning as pruning
from regjax import regularizers as regularizers
from regjax import schedules as schedules
from regjax import transforms as transforms
from regjax._adapters import Model as Model
from regjax._adapters import check_separable as check_separable
from regjax._adapters import couples_examples as couples_examples
from regjax._adapters import from_callable as from_callable
from regjax._adapters import from_linen as from_linen
from regjax._adapters import from_nnx as from_nnx
from regjax._adapters import model_function as model_function
from regjax._adapters import model_loss as model_loss
from regjax._loops import Interrupted as Interrupted
from regjax._statistics import population_statistics as population_statistics
from regjax._statistics import updated_statistics as updated_statistics

__version__ = "0.1.0"

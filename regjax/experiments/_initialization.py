"""The options of normalization and initialisation.

Each class holds the arguments of the function it is named after, under the same names.
"""

import dataclasses
from typing import Literal

Normalization = Literal[
    "none",
    "batch",
    "layer",
    "group",
    "ghost",
    "noisy",
    "lp1",
    "lp2",
    "lpinf",
    "group_plus",
    "mean_only",
    "weight",
    "weight_standardized",
    "weight_mean_only",
]

# Those that make the scale of each filter of the kernel before them, or of the kernel as a whole,
# immaterial.
FILTER_FREE = ("batch", "ghost", "noisy", "lp1", "lp2", "lpinf")
KERNEL_FREE = (*FILTER_FREE, "layer", "group", "group_plus")
GHOST_SIZE = 16  # of the models' "ghost"

Name = Literal["default", "data_dependent", "gradinit"]


@dataclasses.dataclass(frozen=True)
class DataDependent:
    """Outputs of each layer with mean 0 and deviation `std` on a first batch."""

    std: float = 1.0
    """Standard deviation."""

    epsilon: float = 1e-10
    """Added to the variance."""

    num_examples: int = 512
    """Size of the batch, the first training examples."""


@dataclasses.dataclass(frozen=True)
class GradInit:
    """A scale for each parameter array, learned before training."""

    gradient_norm_bound: float = 1.0
    """Bound of the gradient's norm; with the adam step in units of the sum of magnitudes."""

    learning_rate: float = 0.02
    """Of the scales."""

    num_iterations: int = 300
    """Number of iterations."""

    half_batch: int = 64
    """Examples of a half batch; an iteration takes three."""

    first_step: Literal["sgd", "adam"] = "sgd"
    """Step of which the loss after it is looked at."""

    first_step_learning_rate: float = 0.1
    """Length of that step."""

    clip: float = 1.0
    """Bound of each scale's derivative."""

    second_order: bool = False
    """Differentiate through the step."""

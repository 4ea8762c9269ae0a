"""The options of the transformations.

Each class holds the arguments of the function it is named after, under the same names.
"""

import dataclasses
from typing import Literal

Name = Literal[
    "plain",
    "sam",
    "gsam",
    "perturbed_gradient",
    "anticorrelated_noise",
    "entropy_sgd",
    "rescale_weights",
    "coherent_regularization",
    "soft_threshold",
    "spectral_controller",
]


@dataclasses.dataclass(frozen=True)
class Sam:
    """Gradient at the top of an ascent step."""

    rho: float = 0.05
    """Radius, Euclidean, in units of the parameters."""

    adaptive: bool = False
    """Radius relative to each weight (ASAM)."""

    eta: float = 0.01
    """Added to the weights' magnitudes if adaptive."""

    num_shards: int = 1
    """Parts of the batch with ascents of their own (m-sharpness)."""


@dataclasses.dataclass(frozen=True)
class Gsam:
    """SAM with the gap between perturbed and clean loss."""

    rho: float = 0.05
    """Radius, Euclidean, in units of the parameters."""

    alpha: float = 0.4
    """Weight of the gap."""

    adaptive: bool = False
    """Radius relative to each weight."""

    eta: float = 0.01
    """Added to the weights' magnitudes if adaptive."""


@dataclasses.dataclass(frozen=True)
class PerturbedGradient:
    """Gradient at weights with Gaussian noise."""

    scale: float = 0.03
    """Standard deviation, in units of the parameters."""

    layerwise: bool = True
    """One array a step, or all with noise divided by the root of their number."""

    cyclic: bool = True
    """Arrays in turn, or drawn uniformly."""


@dataclasses.dataclass(frozen=True)
class AnticorrelatedNoise:
    """Difference of two successive noises added to each update."""

    scale: float = 0.03
    """Standard deviation, in units of the parameters."""


@dataclasses.dataclass(frozen=True)
class EntropySgd:
    """Gradient of the local entropy, by a Langevin walk over the batches that follow."""

    gamma: float = 1e-4
    """Stiffness of the well, in units of the loss over the parameter squared."""

    growth: float = 1e-3
    """Relative growth of gamma with each update (scoping)."""

    num_steps: int = 5
    """Inner steps."""

    step_size: float = 0.1
    """Inner learning rate."""

    noise_scale: float = 1e-4
    """Standard deviation of the noise per square root of the step size."""

    averaging: float = 0.25
    """Weight of the new point in the running mean."""

    momentum: float = 0.9
    """Inner Nesterov momentum."""

    scale_by_gamma: bool = False
    """Multiply the outer gradient by gamma."""


@dataclasses.dataclass(frozen=True)
class RescaleWeights:
    """Kernels that feed a normalization are rescaled after each step."""

    target: float = 1.0
    """Norm after the step."""

    per_filter: bool = True
    """One norm for each output channel, or for each array."""

    every: int = 1
    """Rescale after each so many steps."""


@dataclasses.dataclass(frozen=True)
class CoherentRegularization:
    """Penalty of the kernels that is on while a gate is open."""

    strength: float = 1e-3
    """Factor of the penalty."""

    penalty: Literal["l2", "l1"] = "l2"
    """Half the squared norm, or the sum of magnitudes."""

    gate: Literal["cosine", "ratio", "delayed", "always"] = "cosine"
    """When the penalty is on."""

    threshold: float = 0.5
    """Of the cosine or the ratio."""

    hold: int | None = None
    """Open steps in a row after which the gate stays open."""

    num_steps: int = 100
    """Delay of the delayed gate, in steps."""


@dataclasses.dataclass(frozen=True)
class SoftThreshold:
    """Kernels' L1 penalty by its proximal step."""

    threshold: float = 1e-4
    """Learning rate times strength, in units of the parameters."""


@dataclasses.dataclass(frozen=True)
class SpectralController:
    """Learning rate and momentum from the curvature of the batch at hand, in place of sgd's.

    Until a curvature has been found the learning rate is --learning-rate.
    """

    refresh_every: int = 100
    """Steps between two looks at the curvature; the first is before the first step."""

    num_steps: int = 20
    """Lanczos steps, a Hessian product each."""

    rule: Literal["nesterov", "polyak", "paper_nesterov"] = "nesterov"
    """How rate and momentum follow; with polyak the momentum is heavy ball, else Nesterov's."""

    smallest_ratio: float = 1e-3
    """Least ratio of the smallest curvature to the largest that a rule is given."""

    max_momentum: float = 0.99
    """Bound of the momentum, below 1."""

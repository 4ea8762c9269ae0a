"""The transformations of the command line: each class of options makes its transformation.

A class here is all that a transformation needs for `--transformation NAME`, its own options
`--NAME.FIELD`, its help and its place in checkpoints. The name is the class's in the spelling of
the function that it stands for.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

import optax

from regjax import _checks, schedules, transforms
from regjax._base import Params
from regjax.experiments._kernels import kernels, normalized_kernels
from regjax.experiments._normalization import NORMALIZATIONS
from regjax.experiments._options import UsageError, by_name
from regjax.experiments._transformation import Descent, Links, Transformation


@dataclasses.dataclass(frozen=True)
class Plain(Transformation):
    """The optimiser alone."""

    def make(self, descent: Descent) -> optax.GradientTransformation:
        """Makes what changes nothing."""
        return optax.identity()

    def chain(self, descent: Descent) -> Links:
        """Returns the optimiser alone."""
        return (descent.steps,)


@dataclasses.dataclass(frozen=True)
class Sam(Transformation):
    """Gradient at the top of an ascent step."""

    rho: float = 0.05
    """Radius, Euclidean, in units of the parameters."""

    adaptive: bool = False
    """Measure the radius relative to each weight (ASAM)."""

    eta: float = 0.01
    """Added to the magnitudes of the weights, if adaptive."""

    num_shards: int = 1
    """Number of parts of the batch, each with an ascent of its own (m-sharpness)."""

    def make(self, descent: Descent) -> optax.GradientTransformation:
        """Makes `transforms.sam`."""
        return transforms.sam(**self.arguments())

    def missing(self) -> dict[str, str]:
        """Returns what `eta` needs."""
        return {} if self.adaptive else {"eta": self.option("adaptive")}

    def check(self, descent: Descent) -> None:
        """Checks that the batch can be divided."""
        if descent.batch_size % self.num_shards:
            raise UsageError(
                f"{self.option('num_shards')} must divide the batch size, {descent.batch_size}, "
                f"got {self.num_shards}."
            )

    def count_shards(self) -> int:
        """Returns the number of ascents."""
        return self.num_shards


@dataclasses.dataclass(frozen=True)
class Gsam(Transformation):
    """SAM with the gap between perturbed and clean loss."""

    rho: float = 0.05
    """Radius, Euclidean, in units of the parameters."""

    alpha: float = 0.4
    """Weight of the gap."""

    adaptive: bool = False
    """Measure the radius relative to each weight."""

    eta: float = 0.01
    """Added to the magnitudes of the weights, if adaptive."""

    def make(self, descent: Descent) -> optax.GradientTransformation:
        """Makes `transforms.gsam`."""
        return transforms.gsam(**self.arguments())

    def missing(self) -> dict[str, str]:
        """Returns what `eta` needs."""
        return {} if self.adaptive else {"eta": self.option("adaptive")}


@dataclasses.dataclass(frozen=True)
class PerturbedGradient(Transformation):
    """Gradient at weights with Gaussian noise."""

    std: float = 0.03
    """Standard deviation, in units of the parameters."""

    layerwise: bool = True
    """Perturb one array per step, instead of all with noise over the root of their number."""

    cyclic: bool = True
    """Take the arrays in turn, instead of drawing them."""

    def make(self, descent: Descent) -> optax.GradientTransformation:
        """Makes `transforms.perturbed_gradient`."""
        return transforms.perturbed_gradient(**self.arguments(), key=descent.key)

    def missing(self) -> dict[str, str]:
        """Returns what `cyclic` needs."""
        return {} if self.layerwise else {"cyclic": self.option("layerwise")}


@dataclasses.dataclass(frozen=True)
class AnticorrelatedNoise(Transformation):
    """Difference of two successive noises added to each update."""

    std: float = 0.03
    """Standard deviation, in units of the parameters."""

    def make(self, descent: Descent) -> optax.GradientTransformation:
        """Makes `transforms.anticorrelated_noise`."""
        return transforms.anticorrelated_noise(**self.arguments(), key=descent.key)

    def chain(self, descent: Descent) -> Links:
        """Returns the optimiser and the noise behind it."""
        return descent.steps, self.make(descent)

    def params_to_evaluate(self, params: Params, state: optax.OptState) -> Params:
        """Returns the parameters without the noise that is kept on them."""
        return transforms.denoise_params(params, state[-1])


@dataclasses.dataclass(frozen=True)
class EntropySgd(Transformation):
    """Gradient of the local entropy, by a Langevin walk over the batches that follow.

    With it --learning-rate is 1 and --momentum 0 by default.
    """

    gamma: float = 1e-4
    """Stiffness of the well, in units of the loss over the parameter squared."""

    growth: float = 1e-3
    """Relative growth of gamma with each update (scoping)."""

    num_inner_steps: int = 5
    """Number of steps of the walk."""

    learning_rate: float = 0.1
    """Learning rate of the walk."""

    noise_scale: float = 1e-4
    """Standard deviation of the noise per square root of the walk's learning rate."""

    averaging: float = 0.25
    """Weight of the new point in the running mean."""

    momentum: float = 0.9
    """Nesterov momentum of the walk."""

    scale_by_gamma: bool = False
    """Multiply the outer gradient by gamma."""

    most: ClassVar[Mapping[str, int]] = {"num_inner_steps": 10_000}
    # Moves to the mean of the walk.
    usual_learning_rate: ClassVar[float | None] = 1.0
    usual_momentum: ClassVar[float | None] = 0.0

    def make(self, descent: Descent) -> optax.GradientTransformation:
        """Makes `transforms.entropy_sgd` with a gamma that grows."""
        gamma = _checks.non_negative("gamma", self.gamma)
        return transforms.entropy_sgd(
            schedules.scoping_schedule(gamma, self.growth),
            **self.arguments("gamma", "growth"),
            key=descent.key,
        )


@dataclasses.dataclass(frozen=True)
class RescaleWeights(Transformation):
    """Kernels that feed a normalization are rescaled after each step."""

    target_norm: float = 1.0
    """Norm after the step."""

    per_filter: bool = True
    """Rescale each output channel, instead of each array."""

    every: int = 1
    """Steps between two rescalings."""

    def make(self, descent: Descent) -> optax.GradientTransformation:
        """Makes `transforms.rescale_weights` of the kernels before a normalization."""
        return transforms.rescale_weights(**self.arguments(), mask=normalized_kernels)

    def chain(self, descent: Descent) -> Links:
        """Returns the optimiser and the correction behind it."""
        return descent.steps, self.make(descent)

    def check(self, descent: Descent) -> None:
        """Checks that the network does not change when its kernels are rescaled."""
        name, normalization = descent.normalization, NORMALIZATIONS[descent.normalization]
        if not normalization.frees_kernels:
            allowed = [other for other, kind in NORMALIZATIONS.items() if kind.frees_kernels]
            raise UsageError(
                f"--transformation {self.name()} must have a --normalization that divides the "
                f"scale out, {', '.join(allowed)}, got {name}."
            )
        if self.per_filter and not normalization.frees_filters:
            raise UsageError(
                f"{self.option('per_filter')} must be off with --normalization {name}, which "
                "makes only whole kernels scale-invariant."
            )


@dataclasses.dataclass(frozen=True)
class CoherentRegularization(Transformation):
    """Penalty of the kernels that is on while a gate is open."""

    strength: float = 1e-3
    """Factor of the penalty."""

    penalty: Literal["l2", "l1"] = "l2"
    """Half the squared norm, or the sum of magnitudes."""

    gate: Literal["cosine", "ratio", "delayed", "always"] = "cosine"
    """Rule that decides when the penalty is on."""

    threshold: float = 0.5
    """Threshold of the cosine (below 1) or of the ratio of norms."""

    hold: int | None = None
    """The gate stays open after this many open steps in a row. Default: it closes again."""

    delay: int = 100
    """Steps before the delayed gate opens."""

    def make(self, descent: Descent) -> optax.GradientTransformation:
        """Makes `transforms.coherent_regularization` of the kernels."""
        gates = {
            "cosine": lambda: transforms.cosine_gate(self.threshold, hold=self.hold),
            "ratio": lambda: transforms.ratio_gate(self.threshold, hold=self.hold),
            "delayed": lambda: transforms.delayed_gate(self.delay),
            "always": transforms.always_gate,
        }
        penalty_gradients = {"l2": transforms.l2_gradient, "l1": transforms.l1_gradient}
        return transforms.coherent_regularization(
            self.strength,
            gate=gates[self.gate](),
            penalty_gradient=penalty_gradients[self.penalty],
            mask=kernels,
        )

    def check(self, descent: Descent) -> None:
        """Checks that the gate can be open: a cosine is at most 1."""
        if self.gate == "cosine" and not self.threshold < 1:
            raise UsageError(
                f"{self.option('threshold')} must be below 1 with {self.option('gate')} cosine, "
                f"got {self.threshold}."
            )

    def missing(self) -> dict[str, str]:
        """Returns what the options of the other gates need."""
        gate, found = self.option("gate"), {}
        if self.gate not in ("cosine", "ratio"):
            found = dict.fromkeys(("threshold", "hold"), f"{gate} cosine or ratio")
        return found if self.gate == "delayed" else {**found, "delay": f"{gate} delayed"}


@dataclasses.dataclass(frozen=True)
class SoftThreshold(Transformation):
    """Kernels' L1 penalty by its proximal step."""

    threshold: float = 1e-4
    """Learning rate times strength, in units of the parameters."""

    def make(self, descent: Descent) -> optax.GradientTransformation:
        """Makes `transforms.soft_threshold` of the kernels."""
        return transforms.soft_threshold(**self.arguments(), mask=kernels)

    def chain(self, descent: Descent) -> Links:
        """Returns the optimiser and the proximal step behind it."""
        return descent.steps, self.make(descent)


@dataclasses.dataclass(frozen=True)
class SpectralController(Transformation):
    """Learning rate and momentum from the curvature of the batch at hand, in place of sgd's.

    Until a curvature has been found the learning rate is --learning-rate, and the momentum 0.
    """

    every: int = 100
    """Steps between curvature estimates; the first is before the first step."""

    num_steps: int = 20
    """Lanczos steps per estimate, each one Hessian product."""

    rule: Literal["nesterov", "polyak"] = "nesterov"
    """Rule that turns curvature into learning rate and momentum (heavy ball with polyak)."""

    smallest_ratio: float = 1e-3
    """Smallest ratio of least to largest curvature that the rule is given."""

    max_momentum: float = 0.99
    """Bound of the momentum, below 1."""

    most: ClassVar[Mapping[str, int]] = {"num_steps": 1000, "smallest_ratio": 1}
    usual_momentum: ClassVar[float | None] = 0.0

    def make(self, descent: Descent) -> optax.GradientTransformation:
        """Makes `transforms.spectral_controller`."""
        rules = {"nesterov": schedules.nesterov_rule, "polyak": schedules.polyak_rule}
        return transforms.spectral_controller(
            **self.arguments("rule"),
            key=descent.key,
            initial_learning_rate=descent.learning_rate,
            rule=rules[self.rule],
            nesterov=self.rule == "nesterov",
        )

    def chain(self, descent: Descent) -> Links:
        """Returns the weight decay and the controller in place of sgd."""
        return descent.decay, self.make(descent)

    def check(self, descent: Descent) -> None:
        """Checks that there is an sgd without momentum to take the place of."""
        name = f"--transformation {self.name()}"
        if descent.optimizer != "sgd":
            raise UsageError(f"{name} must have --optimizer sgd, got {descent.optimizer}.")
        if descent.momentum:
            raise UsageError(
                f"{name} must have no --momentum, which it finds, got {descent.momentum}."
            )


TRANSFORMATIONS = by_name(Transformation.__subclasses__())

if TYPE_CHECKING:
    Name: TypeAlias = str
else:
    Name = Literal[tuple(TRANSFORMATIONS)]

"""The initialisations of the command line: each class of options makes initial parameters.

A class here is all that an initialisation needs for `--init NAME` and its options `--NAME.FIELD`.
The name is the class's in the spelling of the function that it stands for.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from regjax import _checks, initializers
from regjax._adapters import Model, model_loss
from regjax._base import LossFn, Params, PRNGKey
from regjax.experiments._dataset import Dataset
from regjax.experiments._inputs import Scaling, cross_entropy, measure_scaling, normalize
from regjax.experiments._options import Options, UsageError, by_name

# Folded into the key of the seed for noise in train mode.
_NOISE = 2


class Initialization(Options, abc.ABC):
    """What is done to the initial parameters."""

    @abc.abstractmethod
    def make(self, model: Model, dataset: Dataset, *, dtype: str, seed: int) -> Params:
        """Makes the initial parameters.

        Raises:
          UsageError: there are fewer training examples than the options ask for.
        """

    def check(self) -> None:
        """Checks the ranges of the options.

        Raises:
          ValueError: an option is out of its range; the message has its name in backticks.
          TypeError: an option has the wrong type.
        """

    def batch_sizes(self) -> dict[str, int]:
        """Returns the sizes of the batches that go through the network, by option."""
        return {}

    def num_examples_taken(self) -> dict[str, int]:
        """Returns the numbers of different training examples that are taken at once, by option."""
        return self.batch_sizes()

    def _check_enough(self, dataset: Dataset) -> None:
        for name, number in self.num_examples_taken().items():
            if number > len(dataset.train_targets):
                raise UsageError(
                    f"{name} must be at most the number of training examples, "
                    f"{len(dataset.train_targets)}, got {number}."
                )


@dataclasses.dataclass(frozen=True)
class Default(Initialization):
    """The network's own."""

    def make(self, model: Model, dataset: Dataset, *, dtype: str, seed: int) -> Params:
        """Returns the parameters as they are."""
        del dataset, dtype, seed
        return model.params


@dataclasses.dataclass(frozen=True)
class DataDependent(Initialization):
    """Outputs of each layer with mean 0 and deviation `std` on a first batch."""

    std: float = 1.0
    """Standard deviation of the outputs."""

    epsilon: float = 1e-10
    """Added to the variance."""

    num_examples: int = 512
    """Size of the batch, the first training examples."""

    def make(self, model: Model, dataset: Dataset, *, dtype: str, seed: int) -> Params:
        """Makes parameters by `initializers.data_dependent`."""
        self._check_enough(dataset)
        images = jnp.asarray(dataset.train_inputs[: self.num_examples])
        return initializers.data_dependent(
            model,
            model.params,
            model.state,
            normalize(images, measure_scaling(dataset, dtype)),
            **self.arguments("num_examples"),
            key=_noise_key(seed),
        )

    def check(self) -> None:
        """Checks the ranges of the options."""
        _checks.positive("std", self.std)
        _checks.non_negative("epsilon", self.epsilon)
        _checks.integer("num_examples", self.num_examples, minimum=2)  # for a deviation

    def batch_sizes(self) -> dict[str, int]:
        """Returns the size of the batch."""
        return {self.option("num_examples"): self.num_examples}


@dataclasses.dataclass(frozen=True)
class Gradinit(Initialization):
    """A scale for each parameter array, learned before training."""

    gradient_norm_bound: float = 1.0
    """Bound of the gradient: of its norm (sgd), or of the sum of magnitudes (adam)."""

    learning_rate: float = 0.02
    """Learning rate of the scales."""

    num_iterations: int = 300
    """Number of iterations, each on other examples."""

    half_batch: int = 64
    """Examples per half batch; an iteration takes three half batches."""

    first_step: Literal["sgd", "adam"] = "sgd"
    """Simulated optimizer step whose resulting loss is minimized."""

    first_step_learning_rate: float | None = None
    """Learning rate of the simulated step. Default: 0.1 (sgd) or 1e-3 (adam)."""

    clip: float | None = None
    """Bound of the derivative of each scale. Default: 1 (sgd) or 1e8 (adam)."""

    second_order: bool = False
    """Differentiate through the step."""

    most: ClassVar[Mapping[str, int]] = {"num_iterations": 10_000}

    def make(self, model: Model, dataset: Dataset, *, dtype: str, seed: int) -> Params:
        """Makes parameters by `initializers.gradinit`, each iteration on other examples."""
        num_examples, size = len(dataset.train_targets), 3 * self.half_batch
        self._check_enough(dataset)
        random = np.random.default_rng(seed)
        drawn = [
            random.choice(num_examples, size, replace=False) for _ in range(self.num_iterations)
        ]
        rows = np.stack(drawn).reshape(-1, 3, self.half_batch)
        batches = (
            jnp.asarray(dataset.train_inputs[rows]),
            jnp.asarray(dataset.train_targets[rows]),
        )
        loss = model_loss(model, cross_entropy, mode="train", key=_noise_key(seed))
        result = initializers.gradinit(
            Partial(_loss, loss, measure_scaling(dataset, dtype)),
            model.params,
            batches,
            **self.arguments("num_iterations", "half_batch"),
        )
        return result.params

    def check(self) -> None:
        """Checks the ranges of the options."""
        for name in ("num_iterations", "half_batch"):
            _checks.integer(name, getattr(self, name))
        if self.first_step_learning_rate is not None:
            _checks.positive("first_step_learning_rate", self.first_step_learning_rate)
        for name in ("gradient_norm_bound", "learning_rate", "clip"):
            if getattr(self, name) is not None:
                _checks.non_negative(name, getattr(self, name))

    def batch_sizes(self) -> dict[str, int]:
        """Returns the size of a half batch."""
        return {self.option("half_batch"): self.half_batch}

    def num_examples_taken(self) -> dict[str, int]:
        """Returns the number of examples of an iteration."""
        return {f"three times {self.option('half_batch')}": 3 * self.half_batch}


def _noise_key(seed: int) -> PRNGKey:
    return jax.random.fold_in(jax.random.key(seed), _NOISE)


def _loss(
    loss_fn: LossFn, scaling: Scaling, params: Params, images: jax.Array, labels: jax.Array
) -> jax.Array:
    return loss_fn(params, normalize(images, scaling), labels)


INITIALIZATIONS = by_name(Initialization.__subclasses__())

if TYPE_CHECKING:
    Name: TypeAlias = str
else:
    Name = Literal[tuple(INITIALIZATIONS)]

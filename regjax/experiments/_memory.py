"""Whether a run can fit into memory, from shapes alone: what it needs at the very least."""

import math
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from regjax import _jaxprs
from regjax._adapters import Model
from regjax.experiments._dataset import Dataset
from regjax.experiments._network import EVALUATION_CHUNK
from regjax.experiments._options import UsageError
from regjax.experiments._settings import (
    LandscapeSettings,
    SpectrumSettings,
    TrainSettings,
)

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
# Parameters before and after a step, gradient and momentum.
_COPIES = 4
# Of the outputs of all operations, those that a derivative needs again, at the least.
_SHARE_KEPT = 0.25


def check_memory(settings: TrainSettings, dataset: Dataset, model: Model) -> None:
    """Checks that parameters, activations and the solvers' vectors can fit at all.

    What is counted is less than what a run takes; a device that has room for this may still be
    full later.

    Args:
      settings: the options.
      dataset: the examples.
      model: with shapes for arrays.

    Raises:
      UsageError: the device has less memory than the parameters, the images of a pass or the
        vectors of the analysis take.
    """
    room = available_bytes()
    size, itemsize = num_parameters(model), np.dtype(settings.dtype).itemsize
    held = _COPIES * size * itemsize
    _check(room, held, f"{size:,} parameters in training", "--width or --depth")
    _check(
        room,
        held + _activation_bytes(settings, dataset, model),
        "parameters and activations",
        "--width, --batch-size or --chunk-size",
    )
    if isinstance(settings, SpectrumSettings):
        # Steps that are chosen are as many as fit, and not fewer than 40.
        rows = max(settings.num_eigenvalues, settings.num_steps or 40) + settings.num_probes
        _check(
            room,
            (rows + 1) * size * itemsize,
            f"the {rows} vectors of the spectrum",
            "--num-eigenvalues, --num-steps or --num-probes",
        )


def num_parameters(model: Model) -> int:
    """Returns the number of parameters, of shapes too; Python integers do not overflow."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.params))


def available_bytes() -> float:
    """Returns the memory that the first device has for this process; infinity if nobody knows."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    found = [math.inf]
    try:
        lines = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
        found.append(int(_CGROUP.read_text()))
    except (OSError, KeyError, ValueError):  # another system, or no limit
        pass
    return min(found)


def _check(room: float, needed: float, what: str, lower: str) -> None:
    if needed > room:
        raise UsageError(
            f"A run must fit into memory: {what} take at least {_short(needed)}, and there are "
            f"{_short(room)}. Lower {lower}."
        )


def _activation_bytes(settings: TrainSettings, dataset: Dataset, model: Model) -> float:
    """Returns the largest of what a training step, an evaluation and the analysis hold."""
    num_examples = len(dataset.train_targets)
    outputs = list(_output_bytes(settings, dataset, model))
    passes = [
        _SHARE_KEPT * settings.batch_size * sum(outputs),
        min(EVALUATION_CHUNK, num_examples) * max(outputs),
    ]
    if isinstance(settings, SpectrumSettings):
        examples = min(settings.chunk_size, settings.curvature_examples or num_examples)
        passes.append(_SHARE_KEPT * examples * sum(outputs))
    elif isinstance(settings, LandscapeSettings):
        examples = min(settings.chunk_size, settings.surface_examples or num_examples)
        passes.append(examples * max(outputs))
    return max(passes)


def _output_bytes(settings: TrainSettings, dataset: Dataset, model: Model) -> Iterable[float]:
    """Yields the bytes an example that each operation of the network makes."""
    count = 16  # a multiple of what a normalization divides a batch by
    shape = (count, *dataset.train_inputs.shape[1:])
    inputs = jax.ShapeDtypeStruct(shape, jnp.dtype(settings.dtype))
    traced = jax.make_jaxpr(lambda *arguments: model.apply(*arguments, train=False))(
        model.params, model.state, inputs
    )
    for equation in _jaxprs.equations(traced.jaxpr):
        if not any(True for _ in _jaxprs.inner_jaxprs(equation)):
            for variable in equation.outvars:
                shape = variable.aval.shape
                if count in shape[:1]:
                    yield math.prod(shape) * variable.aval.dtype.itemsize / count


def _short(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"

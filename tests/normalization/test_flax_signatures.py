"""Every argument of flax's layer of that name is one of ours: the signatures side by side.

An argument that flax adds fails here until ours has it or a reason stands below.
"""

import inspect

import pytest
from flax import linen, nnx

from regjax import normalization

PAIRS = [
    ("BatchNorm", "BatchNorm"),
    ("GhostBatchNorm", "BatchNorm"),
    ("NoisyBatchNorm", "BatchNorm"),
    ("MeanOnlyBatchNorm", "BatchNorm"),
    ("LpNorm", "BatchNorm"),
    ("GroupNormPlus", "GroupNorm"),
    ("BatchNormGroupNorm", "GroupNorm"),
    ("ParallelGroupBatchNorm", "GroupNorm"),
    ("WeightNorm", "WeightNorm"),
]
REASONS = {
    ("nnx", "WeightNorm", "layer_instance"): "given by position; the attribute is `layer`",
    ("linen", "MeanOnlyBatchNorm", "epsilon"): "nothing is divided",
    ("linen", "MeanOnlyBatchNorm", "use_fast_variance"): "there is no variance",
    ("linen", "LpNorm", "use_fast_variance"): "the norm is not centred, so that nothing cancels",
}
REASONS |= {("nnx", *key[1:]): why for key, why in REASONS.items() if key[0] == "linen"}


def parameters(kind):
    """By name; the class of an nnx module shows (*args, **kwargs) unless it says more."""
    if (
        isinstance(kind, type)
        and issubclass(kind, nnx.Module)
        and not hasattr(kind, "__signature__")
    ):
        kind = kind.__init__
    return inspect.signature(kind).parameters


def options(kind):
    return set(parameters(kind)) - {"self", "parent", "name", "args", "kwargs"}


@pytest.mark.parametrize("face", ["linen", "nnx"])
@pytest.mark.parametrize(("name", "flax_name"), PAIRS)
def test_no_argument_of_flax_is_missing(name, flax_name, face):
    ours = getattr(getattr(normalization, face), name)
    theirs = getattr({"linen": linen, "nnx": nnx}[face], flax_name)
    missing = options(theirs) - options(ours)
    excused = {key[2] for key in REASONS if key[:2] == (face, name)}
    assert missing == excused  # a reason that is not needed any more goes too
    in_call = options(theirs.__call__) - {"x"}
    assert in_call <= options(ours.__call__)


@pytest.mark.parametrize("face", ["linen", "nnx"])
def test_defaults_are_flax_s(face):
    """So that a layer is changed by its import; what differs is said in the docstring."""
    ours, theirs = getattr(normalization, face).BatchNorm, {"linen": linen, "nnx": nnx}[face]
    mine = parameters(ours)
    others = {"promote_dtype", "rngs", "parent", "name", "self", "bias_metadata", "scale_metadata"}
    for name, parameter in parameters(theirs.BatchNorm).items():
        if name.endswith("_init") or name in others:
            continue  # other objects for the same values, or not needed
        assert mine[name].default == parameter.default, name

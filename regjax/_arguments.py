"""What every public function checks before anything else, by the names of its arguments.

A name has one meaning in the whole library (docs/vocabulary.md), and so it has one rule: a count
is an integer, a key a typed key, parameters a tree of real floating-point arrays, a loss can be
called. What only one function knows, such as a sign or a largest k, is checked there.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from regjax import _axes, _checks, _meshes, _selection

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
Rule: TypeAlias = Callable[[str, Any], object]
"""(name, value) -> anything; raises."""

ACCUMULATIONS = ("compensated", "float64")
# What says which of the parameters are meant.
_SELECTIONS = ("wrt", "mask")
_LEAVE_OUT = (
    " Leave it out by `wrt` or `mask`, or by `regjax.subset`: what is not chosen may have any type."
)
# Trees that have the structure and the shapes of `params`, where there are any.
_LIKE_PARAMS = ("direction", "other_direction", "other_params", "updates", "vector")


def checked(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Checks the arguments of a public function by their names, each time it is called.

    Raises:
      TypeError: an argument has the wrong type, as a function that cannot be called.
      ValueError: an argument is out of its range, or a tree is not like the parameters.
    """
    signature = inspect.signature(function)
    rules = {name: RULES[name] for name in signature.parameters if name in RULES}
    defaults = {name: signature.parameters[name].default for name in rules}
    selects = any(name in signature.parameters for name in _SELECTIONS)

    @functools.wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            remedy = "; as in key=jax.random.key(0)" if str(error).endswith("'key'") else ""
            raise TypeError(f"`{_form(function.__name__, signature)}`: {error}{remedy}.") from None
        for name, rule in rules.items():
            value = given.get(name)
            # What None means is the function's own.
            if value is None or value is defaults[name]:
                continue
            if name in _LIKE_PARAMS and "params" in given and given.get("wrt") is None:
                _checks.same_tree(name, value, given["params"])
            if selects and (name == "params" or (name in _LIKE_PARAMS and "wrt" not in given)):
                _parameters(name, value, given)
            else:
                rule(name, value)
        return _meshes.settled(function, *args, **kwargs)

    call.__dict__["checks"] = tuple(rules)
    return call


def _form(name: str, signature: inspect.Signature) -> str:
    """Writes how a function is called: what it needs, and "..." for what it can do without."""
    texts = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            texts.append(f"*{parameter.name}")
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            if parameter.kind is parameter.KEYWORD_ONLY:
                texts.append(f"{parameter.name}=")
            else:
                texts.append(parameter.name)
    more = len(texts) < len(signature.parameters)
    return f"{name}({', '.join(texts + ['...'] * more)})"


def _parameters(name: str, value: Any, given: Mapping[str, Any]) -> None:
    """Checks the parameters, or a tree like them, of a function that may be told which it means."""
    selection = next((name for name in _SELECTIONS if given.get(name) is not None), None)
    if jax.tree_util.all_leaves([value]):
        selection = None  # one array, or something else
    chosen = None
    if selection is not None:
        chosen = _selection.mask_leaves(given[selection], value, selection)
    _checks.floating_leaves(name, value, chosen, remedy=_LEAVE_OUT)


def _count(name: str, value: object) -> None:
    # Some counts are known only on the device, and a law takes several at once.
    if not isinstance(value, jax.Array) and not (isinstance(value, np.ndarray) and value.ndim):
        _checks.integer(name, value, minimum=None)


def _number(name: str, value: Any) -> None:
    if not callable(value):  # a schedule
        _checks.real(name, value, finite=True)


def _array(name: str, value: Any) -> None:
    if isinstance(value, str):
        raise TypeError(f"`{name}` must be one array, got {value!r}.")
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return  # a list, or what is no array: the function says what it takes
    if 0 in value.shape:
        raise ValueError(f"`{name}` must hold at least one number, got shape {value.shape}.")
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"`{name}` must be real floating point, got {dtype}.")


def _examples(name: str, value: Any) -> None:
    for leaf in jax.tree.leaves(value):
        if getattr(leaf, "shape", ())[:1] == (0,):
            raise ValueError(f"`{name}` must hold at least one example, got 0.")
        _array(name, leaf)


def _start(name: str, value: object) -> None:
    """Checks one vector, several with a leading axis, or an earlier result that has some."""
    _checks.floating_tree(name, getattr(value, "vectors", value))


def _operator(name: str, value: object) -> None:
    if not hasattr(value, "block_product"):
        raise TypeError(
            f"`{name}` must be an operator, as from `hessian` or `from_matvec`, got "
            f"{type(value).__name__}."
        )


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        (
            "batch_size", "block_size", "chunk_size", "deflate", "delay", "every", "k",
            "max_basis", "max_bytes", "max_matvecs", "min_units", "num_directions", "num_each",
            "num_evaluations", "num_examples", "num_groups", "num_inner_steps", "num_iterations",
            "num_matvecs", "num_params", "num_points", "num_probes", "num_removed", "num_rounds",
            "num_samples", "num_shards", "num_steps", "num_to_remove", "num_units",
        ),
        _count,
    ),
    **dict.fromkeys(
        (
            "alpha", "budget", "crossover", "damping", "epsilon", "eta",
            "first_step_learning_rate", "flat_tol", "gamma", "gamma0", "gradient_norm", "growth",
            "initial_learning_rate", "intrinsic_rate", "keep_probability", "kernel_width",
            "learning_rate", "margin", "max_distance", "max_momentum",
            "min_norm", "momentum", "noise_scale", "radius",
            "reference_batch_size", "reference_learning_rate", "rho", "share", "smallest_ratio",
            "std", "strength", "target_norm", "threshold", "tol", "vanishing_threshold",
            "weight_decay", "weight_decay_ratio",
        ),
        _number,
    ),
    **dict.fromkeys(
        ("inverse_batch", "linear_threshold", "noise_power"),
        functools.partial(_checks.non_negative, finite=True),
    ),
    **dict.fromkeys(
        ("clip", "gradient_norm_bound", "largest", "power", "smallest"), _checks.real
    ),
    "key": _checks.key,
    **dict.fromkeys(("mean_grads", "params"), _checks.floating_leaves),
    **dict.fromkeys(_LIKE_PARAMS, _checks.floating_tree),
    **dict.fromkeys(
        (
            "batch_model_fn", "batch_preactivations_fn", "call", "curvature_grad_fn",
            "dropout_loss_fn", "gate_loss", "grad_fn", "law", "loss_fn", "matvec", "model_fn",
            "operator_fn", "output_loss_fn", "preactivations_fn", "rule",
            "value_and_grad_fn", "weight_fn",
        ),
        _checks.function,
    ),
    **dict.fromkeys(
        (
            "batch_means", "batch_variances", "center", "covariance",
            "features", "g", "grid", "initial_kernel", "kernel", "learning_rates", "matrix",
            "other_matrix", "positions", "singular_values", "true_weights", "u", "v",
        ),
        _array,
    ),
    **dict.fromkeys(("centered", "differences"), _checks.boolean),
    **dict.fromkeys(("inputs", "other_inputs"), _examples),
    "layout": _axes.check,
    "accumulation": functools.partial(_checks.choice, allowed=ACCUMULATIONS),
    **dict.fromkeys(("operator", "preconditioner"), _operator),
    "start": _start,
}  # fmt: skip
"""Name of an argument -> its rule."""

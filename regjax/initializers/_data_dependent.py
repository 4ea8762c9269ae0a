"""Data-dependent initialisation: on one batch, outputs of mean zero and a chosen deviation."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.tree_util import PyTreeDef

from regjax import _checks, _layouts, _loops, _numerics, _selection, _tree
from regjax._adapters import Model
from regjax._arguments import checked
from regjax._base import Mask, Params, PRNGKey, State, Tree
from regjax.initializers import _layers
from regjax.initializers._layers import Path

# What a layer is with, where it is looked at: outputs t = v x / |v| or w x.
_PROBE = {"bias": 0, "scale": 1}


@checked
def data_dependent(
    model: Model,
    params: Params,
    state: State,
    inputs: Tree,
    *,
    std: float | Callable[[Path], float] = 1.0,
    epsilon: float = 1e-10,
    mask: Mask = None,
    key: PRNGKey | None = None,
) -> Params:
    """Makes initial parameters that give the outputs of each layer mean 0 and deviation `std`.

        t = v x / |v|,   g = std / sqrt(var[t] + epsilon),   b = -mean[t] g

    Here x is the input of a layer, v a unit's weights, g its length in weight normalization, and b
    its bias. Mean and variance go over the batch and the positions. The layers are set in the order
    in which they run, so that each sees the outputs of those already set. A plain layer has
    t = w x, and its kernel w is multiplied by g. A layer without bias gets g alone. A unit whose
    outputs do not vary on the batch keeps its kernel. The model runs in train mode without dropout,
    and the first run of a shared layer counts.

    Example:
      >>> module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> model = regjax.from_nnx(module)
      >>> inputs = jax.random.normal(jax.random.key(0), (100, 3)) + 5.0
      >>> params = initializers.data_dependent(model, model.params, model.state, inputs, std=0.5)
      >>> outputs = regjax.model_function(model)(params, inputs)
      >>> print(abs(outputs.mean(0)), outputs.std(0))
      [0. 0.] [0.5 0.5]

    Args:
      model: a `Model` from `from_nnx` or `from_linen` with Dense, Linear, Conv and ConvTranspose
        layers, plain or weight-normalized, in any arrangement.
      params: tree of its parameters.
      state: its state. Running statistics are not changed; `regjax.updated_statistics` updates
        them.
      inputs: inputs of one batch, with a leading axis of some hundred examples. The official code
        takes 500.
      std: standard deviation in units of the outputs, or a function of the layer's path in the
        parameters, such as ("block_0", "second", "layer"). The code of PixelCNN++ has 0.1 on
        residual branches.
      epsilon: added to the variance. The default is that of the official code for dense layers.
      mask: which kernels (leaves of two axes or more) are initialised; None: all.
      key: typed key of a linen model's noise in train mode, other than dropout. An nnx model has
        its own keys.

    Returns:
      A tree like `params`.

    Raises:
      TypeError: no layers are known of `model` (as one from `from_callable`), or an argument has
        the wrong type.
      ValueError: layers are stacked in one array, a kernel belongs to no layer that ran, a unit has
        a single value on the batch, the outputs of a layer are not finite, or an option is out of
        its range.

    References:
      T. Salimans, D. Kingma (2016), arXiv:1602.07868, section 3.
    """
    _checks.number("epsilon", epsilon)
    _checks.floating_tree("params", params)
    if not isinstance(params, Mapping):
        raise TypeError(f"`params` must be nested dicts, got {type(params).__name__}.")
    _checks.num_examples(inputs)
    if key is not None:
        _checks.key("key", key)
    _refuse_stacks(params)
    boxed: PyTreeDef = jax.tree.structure(params)
    chosen = _selection.mask_leaves(mask, params)
    model, params = _layers.unboxed(model, params, state)
    wanted = _kernels(params, jax.tree.unflatten(jax.tree.structure(params), chosen))

    def visit(
        path: Path, layer: Params, axis: int, outputs: Callable[[Params], jax.Array]
    ) -> Params:
        if not any(kernel[: len(path)] == path for kernel in wanted):
            return layer
        own = _checks.number("std", std(path) if callable(std) else std, above_zero=True)
        return _initialized(path, layer, axis, outputs, own, epsilon)

    found = _layers.run_layers(model, params, state, inputs, visit, key)
    missing = [k for k in wanted if not any(k[: len(path)] == path for path in found)]
    if missing:
        names = ", ".join("/".join(map(str, path)) for path in missing)
        raise ValueError(
            "`mask` must leave out kernels that belong to no dense or convolutional layer, or to "
            f"one that does not run, got {names}."
        )
    for path, layer in found.items():
        params = _replaced(params, path, layer)
    return jax.tree.unflatten(boxed, jax.tree.leaves(params))


def _refuse_stacks(params: Params) -> None:
    """Refuses layers that run inside of a scan, where the host sees no outputs."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    axes = _layouts.of_leaves(None, params, [False] * len(leaves))
    for (path, leaf), own in zip(leaves, axes, strict=True):
        if own.stack:
            raise ValueError(
                "`params` must have arrays of their own for each layer, got a stack of layers in "
                f"{jax.tree_util.keystr(path)} of shape {jnp.shape(leaf)}: initialise the unrolled "
                "model, whose layers run one after the other, and stack them then."
            )


def _kernels(params: Params, chosen: Mask) -> list[Path]:
    flat, masks = (traverse_util.flatten_dict(tree) for tree in (params, chosen))
    return [path for path, leaf in flat.items() if masks[path] and jnp.ndim(leaf) >= 2]


def _initialized(
    path: Path,
    layer: Params,
    axis: int,
    outputs: Callable[[Params], jax.Array],
    std: float,
    epsilon: float,
) -> Params:
    flat = traverse_util.flatten_dict(layer)
    at = {leaf[-1]: leaf for leaf in flat}  # kernel, bias, scale
    probe = {at[name]: jnp.full_like(flat[at[name]], v) for name, v in _PROBE.items() if name in at}
    t = _tree.wide(outputs(traverse_util.unflatten_dict({**flat, **probe})))
    _check_outputs(path, t)
    axes = tuple(range(t.ndim - 1))
    t, power = _numerics.near_one(t, axes, at_least=math.sqrt(epsilon))
    power = power.reshape(-1)
    mean, variance = jnp.mean(t, axes), jnp.var(t, axes)
    # A deviation this small beside the mean is rounding.
    varies = variance > (16 * jnp.finfo(t.dtype).eps * mean) ** 2
    added = (math.sqrt(epsilon) * power) ** 2
    factor = std * power * jax.lax.rsqrt(jnp.where(varies, variance + added, 1))
    mean = mean / power
    new = {}
    if "scale" in at:
        factor = jnp.where(varies, factor, flat[at["scale"]].astype(t.dtype))
        new[at["scale"]] = factor
    else:
        factor = jnp.where(varies, factor, 1)
        kernel = flat[at["kernel"]]
        others = tuple(i for i in range(kernel.ndim) if i != axis % kernel.ndim)
        new[at["kernel"]] = kernel * jnp.broadcast_to(jnp.expand_dims(factor, others), kernel.shape)
    if "bias" in at:
        new[at["bias"]] = -mean * factor
    cast = {leaf: value.astype(flat[leaf].dtype) for leaf, value in new.items()}
    return traverse_util.unflatten_dict({**flat, **cast})


def _check_outputs(path: Path, t: jax.Array) -> None:
    name = "/".join(map(str, path))
    if t.size // t.shape[-1] < 2:
        raise ValueError(f"`inputs` must give each unit of {name} two values at least, got one.")
    if _loops.is_concrete(t) and not jnp.all(jnp.isfinite(t)):
        raise ValueError(f"`inputs` must give finite outputs of {name}, got NaN or infinity.")


def _replaced(tree: Params, path: Path, new: Params) -> Params:
    if not path:
        return new
    return {**tree, path[0]: _replaced(tree[path[0]], path[1:], new)}

"""The layers of a flax model as they run, each handed to a visitor before it is used.

What a visitor makes of a layer's parameters is what the layers behind it see.
"""

import functools
from collections.abc import Callable

import jax
from flax import linen, nnx
from flax.core import meta

from regjax import normalization
from regjax._adapters import Model, check_model
from regjax._base import Params, PRNGKey, State, Tree
from regjax._linen import LinenRunner
from regjax._nnx import NnxRunner
from regjax._runners import Apply

Path = tuple[str | int, ...]
# (path, parameters, channel axis of the kernel, parameters -> outputs on the layer's inputs)
# -> new parameters
Visit = Callable[[Path, Params, int, Callable[[Params], jax.Array]], Params]

_LINEN = (linen.Dense, linen.Conv, linen.ConvTranspose)
_NNX = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)
# A factor of their kernels changes nothing.
_STANDARDIZED = (
    normalization.linen.WeightStandardizedDense,
    normalization.linen.WeightStandardizedConv,
)


def run_layers(
    model: Model, params: Params, state: State, inputs: Tree, visit: Visit, key: PRNGKey | None
) -> dict[Path, Params]:
    """Returns the new parameters of each dense and convolutional layer, by path, as they ran.

    The model runs once, in train mode without dropout. A layer that runs twice is visited once.
    """
    runner = getattr(model.apply, "run", None)
    if isinstance(runner, LinenRunner):
        found = _run_linen(model, params, state, inputs, visit, key)
    elif isinstance(runner, NnxRunner):
        found = _run_nnx(runner, params, state, inputs, visit)
    else:
        raise TypeError(
            "`model` must come from `from_linen` or `from_nnx`, whose layers are known."
        )
    for path, layer in found.items():
        own = functools.reduce(lambda node, name: node.get(name, {}), path, params)
        if not set(layer) <= set(own):
            raise ValueError(
                f"`model` must have all weights of its layers as parameters, got one of which a "
                f"`wrt` left out some of {'/'.join(map(str, path))}."
            )
    return found


def unboxed(model: Model, params: Params, state: State) -> tuple[Model, Params]:
    """Takes partitions and other metadata of linen off the parameters, after checking the trees."""
    check_model(model)
    if not isinstance(model.apply, Apply):
        return model, params
    model.apply.check(params, state)
    plain = meta.unbox(params)
    return model._replace(apply=model.apply.with_params(plain)), plain


def _run_linen(
    model: Model, params: Params, state: State, inputs: Tree, visit: Visit, key: PRNGKey | None
) -> dict[Path, Params]:
    found: dict[Path, Params] = {}
    is_inside = False

    def intercept(
        call: Callable[..., Tree], args: tuple[Tree, ...], kwargs: dict[str, Tree], context: Tree
    ) -> Tree:
        nonlocal is_inside
        module = context.module
        if isinstance(module, linen.Dropout):
            return args[0]
        is_layer = isinstance(module, _LINEN) and not isinstance(module, _STANDARDIZED)
        if is_inside or context.method_name != "__call__" or not is_layer:
            return call(*args, **kwargs)
        alone = module.clone(parent=None, name=None)
        outputs = lambda params: alone.apply({"params": params}, *args, **kwargs)
        is_inside = True
        try:
            if module.path not in found:
                layer = module.variables["params"]
                found[module.path] = visit(module.path, layer, _channel_axis(module), outputs)
            return outputs(found[module.path])
        finally:
            is_inside = False

    with linen.intercept_methods(intercept):
        model.apply(params, state, inputs, train=True, key=key)
    return found


def _run_nnx(
    runner: NnxRunner, params: Params, state: State, inputs: Tree, visit: Visit
) -> dict[Path, Params]:
    module = runner.module(params, state, train=True)
    module.set_attributes(deterministic=True, raise_if_not_found=False)
    found: dict[Path, Params] = {}
    modules = dict(nnx.iter_modules(module))
    wrappers = normalization.nnx.Reparametrized
    wrapped = [path for path, node in modules.items() if isinstance(node, wrappers)]
    for path, node in modules.items():
        is_part = any(path[: len(outer)] == outer and path != outer for outer in wrapped)
        if _is_layer(node) and not is_part:
            _watch(node, path, visit, found)
    runner.outputs(module, inputs, train=True)
    return found


def _is_layer(node: nnx.Module) -> bool:
    """Tells whether a module is a layer with a kernel whose factor scales the outputs."""
    if isinstance(node, normalization.nnx.WeightNorm):
        # Of any other module it is not known what its kernels do to the outputs.
        return isinstance(node.layer, _NNX) and isinstance(node.scale, nnx.Param)
    return isinstance(node, _NNX)


def _watch(layer: nnx.Module, path: Path, visit: Visit, found: dict[Path, Params]) -> None:
    """Makes `layer` an object of a class of its own, with a call that visits it first."""
    plain = type(layer)
    graph, params = nnx.split(layer)
    outputs = lambda params, inputs: plain.__call__(nnx.merge(graph, params), inputs)

    def call(self: nnx.Module, inputs: jax.Array) -> jax.Array:
        if path not in found:
            pure = nnx.to_pure_dict(params)
            axis = _channel_axis(self)
            found[path] = visit(path, pure, axis, lambda params: outputs(params, inputs))
        return outputs(found[path], inputs)

    object.__setattr__(layer, "__class__", type(plain.__name__, (plain,), {"__call__": call}))


def _channel_axis(layer: linen.Module | nnx.Module) -> int:
    return -2 if getattr(layer, "transpose_kernel", False) else -1

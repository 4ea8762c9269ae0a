"""How a module is called: which function of it, and how it hears of training."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TypeAlias

import jax

from regjax import _checks, _jaxprs
from regjax._base import PRNGKey, Tree

Call: TypeAlias = Callable[..., Tree]
"""(module, inputs, **options) -> outputs."""

MANY_STEPS = 2**20
"""After so many steps no running average has a start to be corrected for."""

_IN_TRAINING = ("train", "training", "is_training", "is_train", "enable_dropout")
_IN_EVALUATION = ("deterministic", "use_running_average", "inference", "is_eval")
_USUAL = _IN_TRAINING + _IN_EVALUATION


def checked_call(call: Call | None, module: object) -> Call | None:
    """Returns the function that runs a module, freed from an object that it is bound to.

    Raises:
      TypeError: `call` is no function, or a method that is bound to something else.
    """
    if call is None:
        return None
    _checks.function("call", call)
    owner = getattr(call, "__self__", None)
    if owner is None or inspect.isbuiltin(call):
        return call
    if type(owner) is not type(module):
        raise TypeError(
            f"`call` must be a function (module, inputs, ...) or a method of "
            f"{type(module).__name__}, got a method of {type(owner).__name__}."
        )
    return getattr(call, "__func__", call)


def takes(function: Call, name: str) -> bool:
    """Tells whether a function has a parameter of this name."""
    return name in _parameters(function)


def needs(function: Call, name: str) -> bool:
    """Tells whether a function has a parameter of this name without a default."""
    parameter = _parameters(function).get(name)
    return parameter is not None and parameter.default is parameter.empty


def check_complete(function: Call, known: Sequence[str] = (), num_leading: int = 2) -> None:
    """Raises TypeError where a call needs more than the module, the inputs and what is known."""
    any_number = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    more = [
        name
        for name, parameter in list(_parameters(function).items())[num_leading:]
        if parameter.default is parameter.empty
        and parameter.kind not in any_number
        and name not in (*known, *_USUAL)
    ]
    if more:
        raise TypeError(
            f"`call` must run the module on `inputs`, one tree, and hear of training as one of "
            f"{', '.join(_USUAL)}; got a function that needs {', '.join(more)} too: pass "
            f"`call=lambda module, inputs, *, train: module(inputs[...], {more[0]}=...)`."
        )


def mode_options(function: Call, train: bool) -> dict[str, bool]:
    """Returns the keywords by which a call hears whether it trains; {} if it takes none of them."""
    parameters = _parameters(function)
    return {
        name: train if name in _IN_TRAINING else not train
        for name in _USUAL
        if name in parameters and _is_flag(parameters[name])
    }


def mode_fields(module: object, train: bool) -> dict[str, bool]:
    """Returns what to replace in a dataclass which says by a field of its own that it trains."""
    fields = getattr(module, "__dataclass_fields__", {})
    return {
        name: train if name in _IN_TRAINING else not train
        for name in _USUAL
        if name in fields and isinstance(getattr(module, name, None), (bool, type(None)))
    }


def check_flags(function: Call, name: str, what: str) -> None:
    """Raises ValueError where a call has flags, none of which is known to be that of training."""
    flags = [
        flag
        for flag, parameter in _parameters(function).items()
        if isinstance(parameter.default, (bool, str)) or parameter.annotation in (bool, "bool")
    ]
    if flags:
        raise not_told(name, f"{what}, and its call has the flags {', '.join(flags)}", flags[0])


def not_told(
    name: str, what: str, flag: str = "its_flag", *, told: Sequence[str] = ()
) -> ValueError:
    """Makes the error for a module that trains without having heard of it.

    Args:
      name: of the module.
      what: the module has that is not training.
      flag: the name of its own keyword, for the example.
      told: the keywords of its call that say so, if there are some.
    """
    if told:
        return ValueError(
            f"`mode` must be 'evaluation' where training changes nothing, got a train mode: {name} "
            f"has {what}, though its call is told by {', '.join(told)}. Hand that on to its layers."
        )
    return ValueError(
        f"`mode` must be 'evaluation' for a module that does not hear of training, got a train "
        f"mode: {name} has {what}. Its call takes none of {', '.join(_USUAL)}: pass the adapter "
        f"`call=lambda module, inputs, *, train: module(inputs, {flag}=train)`, or whatever tells "
        f"it."
    )


def reads_key(function: Callable[[PRNGKey], Tree], key: PRNGKey) -> bool:
    """Tells whether the result of a function depends on the key that it is given."""
    return any(_jaxprs.read(jax.make_jaxpr(function)(key)))


def named_keys(key: PRNGKey, names: tuple[str, ...], start: int = 0) -> dict[str, PRNGKey]:
    """Splits a key into one for each name."""
    return {name: jax.random.fold_in(key, start + i) for i, name in enumerate(names)}


def stream_names(rngs: Sequence[str] | str | None) -> tuple[str, ...] | None:
    """Returns the names of streams of random numbers as a tuple.

    Raises:
      TypeError: `rngs` are no names.
      ValueError: there is none, or one stands there twice.
    """
    if rngs is None:
        return None
    names = (rngs,) if isinstance(rngs, str) else rngs
    is_sequence = isinstance(names, (tuple, list))
    if not is_sequence or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"`rngs` must be the names of streams, which the `key` of the mode is split for, as "
            f"('dropout', 'noise'), got {rngs!r}."
        )
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`rngs` must be one or several different names, got {rngs!r}.")
    return tuple(names)


def optional(package: str, adapter: str) -> ModuleType:
    """Imports a package that not everybody has.

    Raises:
      ImportError: it is not there; says what to install.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        name = {"haiku": "dm-haiku"}.get(package, package)
        raise ImportError(
            f"`{adapter}` needs {name}, which is not installed: pip install {name}, or "
            f"pip install 'regjax[frameworks]'."
        ) from error


def _parameters(function: Call) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin
        return {}


def _is_flag(parameter: inspect.Parameter) -> bool:
    default = parameter.default
    return default is parameter.empty or default is None or isinstance(default, bool)

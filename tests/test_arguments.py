"""Every public function refuses bad values of its arguments, by the argument's name."""

import inspect

import optax
import pytest

import regjax.curvature
from regjax._arguments import RULES, checked
from tests import arguments
from tests.arguments import BAD, EXAMPLES, EXCUSED, OVERRIDES, kind_of
from tests.test_architecture import public_objects


def public_functions():
    """Dotted name -> function, of all rooms but the command line's and the figures."""
    found = {}
    for name, value in public_objects():
        room = name.split(".")[1]
        is_ours = inspect.isfunction(value) and value.__module__.startswith("regjax.")
        if is_ours and room not in {"experiments", "plots", "models"}:
            found[name.removeprefix("regjax.")] = value
    return found


FUNCTIONS = public_functions()


def call(name, function, changed, value):
    """Calls a function with good values, but one."""
    own = OVERRIDES.get(name, {})
    positional, keyword = [], {}
    for parameter in inspect.signature(function).parameters.values():
        given = parameter.name == changed
        if not given and parameter.default is not parameter.empty and parameter.name not in own:
            continue
        made = value if given else own.get(parameter.name, EXAMPLES.get(parameter.name))()
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional.extend(made)
        elif parameter.kind is parameter.VAR_KEYWORD:
            keyword.update(made)
        elif parameter.kind is parameter.KEYWORD_ONLY or parameter.default is not parameter.empty:
            keyword[parameter.name] = made
        else:
            positional.append(made)
    result = function(*positional, **keyword)
    if name in ("transforms.sharpness_aware_gradient", "transforms.noisy_gradient"):
        result(arguments.params(), arguments.inputs(), arguments.targets(), num_updates=0)
    # A transformation sees the parameters, and its mask with them, when it is initialised.
    is_transformation = isinstance(result, optax.GradientTransformation)
    return result.init(arguments.params()) if is_transformation else result


def unchecked(function):
    """Arguments that have a rule which the function does not apply."""
    known = set(inspect.signature(function).parameters) & set(RULES)
    return sorted(known - set(getattr(function, "checks", ())))


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_every_public_function_checks_its_arguments(name):
    assert unchecked(FUNCTIONS[name]) == []


def test_a_function_without_checks_is_found():
    assert unchecked(lambda params, *, tol, other: None) == ["params", "tol"]
    assert unchecked(checked(lambda params, *, tol, other: None)) == []


def test_what_is_not_given_or_left_at_its_default_is_not_checked():
    function = checked(lambda params, *, key=None, tol="x": (params, key, tol))
    assert function({"w": 1.0}) == ({"w": 1.0}, None, "x")
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        function({"w": 1.0}, key=0)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_bad_values_are_refused_by_name(name, default_promotion):
    function, accepted = FUNCTIONS[name], []

    def note(text):
        accepted.append(f"{parameter.name} = {label}: {text}")

    for parameter in inspect.signature(function).parameters.values():
        for label, make in BAD.get(kind_of(parameter.name), {}).items():
            if (name, parameter.name, label) in EXCUSED or (parameter.name, label) in EXCUSED:
                continue
            try:
                call(name, function, parameter.name, make())
            except (TypeError, ValueError) as error:
                if f"`{parameter.name}" not in str(error):
                    note(f"{type(error).__name__} {str(error)[:90]!r}")
            except Exception as error:
                note(f"{type(error).__name__} {str(error)[:90]!r}")
            else:
                note("accepted")
    assert accepted == []


def test_a_call_that_does_not_fit_names_the_function_and_what_it_needs():
    form = r"`top_eigenpairs\(operator, k, key=, \.\.\.\)`"
    with pytest.raises(TypeError, match=rf"{form}: missing .* 'key'; as in key=jax\.random\.key"):
        regjax.curvature.top_eigenpairs(None, 2)
    with pytest.raises(TypeError, match=rf"{form}: too many positional arguments\.$"):
        regjax.curvature.top_eigenpairs(None, 2, None)
    with pytest.raises(TypeError, match=r"`hessian\(loss_fn, params, \*batch, \.\.\.\)`: missing"):
        regjax.curvature.hessian()

"""What works with the dependencies of `pip install regjax` alone, and what says that it does not.

`python without_extras.py` in an environment without the extras, as `.ci/run` makes one from the
built wheel; `python without_extras.py --block` elsewhere: the packages of the extras cannot be
imported then. It imports nothing beside it: the package is tested that is installed.
"""

import importlib
import importlib.abc
import importlib.util
import pkgutil
import sys

EXTRAS = (
    *("sklearn", "tensorflow_datasets", "array_record", "tyro", "tqdm", "matplotlib", "jinja2"),
    *("equinox", "haiku", "keras", "chex", "pytest"),
)


class Blocker(importlib.abc.MetaPathFinder):
    """Finds none of the packages of the extras."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def block():
    sys.meta_path.insert(0, Blocker())
    found = importlib.util.find_spec

    def find_spec(name, package=None):
        return None if name.partition(".")[0] in EXTRAS else found(name, package)

    importlib.util.find_spec = find_spec


def message_of(function):
    """The error of a call that needs an extra; anything else than one line is a fault."""
    try:
        function()
    except Exception as error:
        text = str(error)
        assert "\n" not in text, text
        return text
    raise AssertionError("It must need an extra.")


def main():
    import jax
    import jax.numpy as jnp

    import regjax

    modules = [found.name for found in pkgutil.walk_packages(regjax.__path__, "regjax.")]
    assert len(modules) > 200
    for module in modules:  # what a file needs of an extra it imports where it is used
        importlib.import_module(module)

    # A number that is known: the largest eigenvalue of x' diag(1, 2, 3) x / 2.
    loss_fn = lambda params, scales: jnp.sum(scales * params["x"] ** 2) / 2
    hessian = regjax.curvature.hessian(loss_fn, {"x": jnp.ones(3)}, jnp.array([1.0, 2.0, 3.0]))
    top = regjax.curvature.top_eigenpairs(hessian, 1, key=jax.random.key(0))
    assert abs(float(top.values[0]) - 3) < 1e-5
    regjax.transforms.sam(0.1).init({"x": jnp.ones(3)})

    from regjax.__main__ import main as command
    from regjax.experiments import TrainSettings, load, run_train

    density = regjax.curvature.spectral_density(hessian, key=jax.random.key(1), num_steps=3)
    curve = regjax.curvature.density_curve(density)
    for extra, function in (
        ("run", lambda: regjax.plots.spectrum_figure([regjax.plots.SpectrumPanel("a", curve)])),
        ("run", lambda: load("digits")),
        ("run", lambda: load("cifar10")),
        ("run", lambda: run_train(TrainSettings(), print)),
        ("frameworks", lambda: regjax.from_equinox(object())),
        ("frameworks", lambda: regjax.from_haiku(object(), {})),
        ("frameworks", lambda: regjax.from_keras(object())),
    ):
        text = message_of(function)
        assert f"pip install 'regjax[{extra}]'" in text, text
    assert command(["--version"]) == 0
    assert command(["--help"]) == 0
    assert command(["train"]) == 2
    print(f"regjax {regjax.__version__} works without extras: {regjax.__file__}")


if __name__ == "__main__":
    if "--block" in sys.argv:
        block()
    main()

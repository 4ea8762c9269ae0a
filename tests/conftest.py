"""One setting for all tests: CPU, quick compilation, no implicit promotion of dtypes or ranks.

A fresh machine has no compilation cache; without most of XLA's optimisations the suite takes half
as long. Numerically delicate tests, marked `optimized`, are compiled as for users. They run first:
what is compiled is thrown away between the two kinds, and they are few.

Most of the time goes into compilers, often for a program that was compiled before: by another
worker, in another process that a test starts, before memory was made free, or for another function
that came out the same. So all processes of a run share a cache on disk, which goes with the run. A
program that is compiled in less time than it is read in is not kept.
"""

import collections
import gc
import os
import pathlib
import shutil
import signal
import tempfile

from tests import quick

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.update(quick.ENVIRONMENT | os.environ)
import jax
import pytest

# Every compiled function maps memory, and Linux ends a process at 65530 mappings.
_MAX_MAPPINGS = 15_000
_MAPPINGS = pathlib.Path("/proc/self/maps")
# Set where a second Python is tried: so many cases of each test, and no slow ones.
_MOST_CASES = int(os.environ.get("REGJAX_TEST_CASES") or 0)
_OPTION = "jax_disable_most_optimizations"
_QUICK = jax.config.read(_OPTION)

# Workers, and processes that tests start, inherit what is set. A folder of the user's own stays:
# with JAX_COMPILATION_CACHE_DIR the next run finds what this one has compiled.
_CACHE, _settings = None, {}
if jax.config.jax_compilation_cache_dir is None:
    _CACHE = tempfile.mkdtemp(prefix="regjax-compiled-")
    _settings["jax_compilation_cache_dir"] = _CACHE
if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    _settings["jax_persistent_cache_min_compile_time_secs"] = 0.03
for name, value in _settings.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)

# Most of what is made while a program is traced lives long: collect less often than by default, and
# never look again through modules and tests.
gc.set_threshold(20_000, 20, 20)
gc.disable()

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    # A shell starts background jobs with Ctrl-C ignored, and Python keeps it so: CI is often one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if _CACHE is not None:
        config.add_cleanup(lambda: shutil.rmtree(_CACHE, ignore_errors=True))
    config.addinivalue_line("markers", "optimized: compiled with all optimisations, as for users")
    config.addinivalue_line(
        "markers", "slow: long, and the same on every Python: CI runs it on one"
    )


def _is_optimized(item):
    return item.get_closest_marker("optimized") is not None


def pytest_collection_modifyitems(config, items):
    if _MOST_CASES:
        kept, counts = [], collections.Counter()
        for item in items:
            if item.get_closest_marker("slow") is not None:
                continue
            name = item.nodeid.split("[")[0]
            if counts[name] < _MOST_CASES:
                kept.append(item)
                counts[name] += 1
        config.hook.pytest_deselected(items=sorted(set(items) - set(kept), key=str))
        items[:] = kept
    items.sort(key=lambda item: not _is_optimized(item))


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    quick = _QUICK and not _is_optimized(item)
    if jax.config.read(_OPTION) != quick:
        jax.config.update(_OPTION, quick)
        # The option is no part of the key under which jit remembers what it compiled.
        jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def _shared_context():
    quick.share_context()


@pytest.fixture(autouse=True, scope="module")
def _bounded_mappings():
    if _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > _MAX_MAPPINGS:
        jax.clear_caches()


@pytest.fixture
def default_promotion():
    """JAX's own promotion, for code that is not ours: optax's adam and schedules, users' losses."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield

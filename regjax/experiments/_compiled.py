"""Where the command line keeps compiled programs from one run to the next: most of a short run."""

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax

from regjax.experiments._options import UsageError

OFF = "off"


def use_cache(folder: str | None) -> None:
    """Lets JAX keep what it compiles in a folder, and find it there.

    What is damaged there, or of other versions or another processor, is compiled again. Whoever can
    write to the folder decides what is run.

    Args:
      folder: its path; "off": none. None takes JAX's own if there is one, else "regjax" among the
        user's caches where that can be written.

    Raises:
      UsageError: the folder is given and cannot be written.
    """
    if folder == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    config: Any = jax.config
    if folder is None and config.jax_compilation_cache_dir is not None:
        return
    path = _usual() if folder is None else Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, RuntimeError) as error:
        if folder is None:
            return
        raise UsageError(
            f"--cache-dir must be a folder that can be written, or {OFF}, got {folder}: {error}"
        ) from None
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _usual() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path("~/.cache").expanduser()) / "regjax"

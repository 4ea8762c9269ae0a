"""Where the source of a public name is in the repository, for the [source] links of the reference.

Links and no copies: pages with the code would be half of the site, and of what its search finds.
"""

import importlib
import inspect
import pathlib
from typing import Any


def address(repository: str, top: pathlib.Path, info: dict[str, Any]) -> str | None:
    """The lines of a function or a class of ours in the repository; None of anything else."""
    found: Any = importlib.import_module(info["module"])
    for name in info["fullname"].split("."):
        found = getattr(found, name, None)
    found = inspect.unwrap(found) if callable(found) else None
    if not (inspect.isfunction(found) or inspect.isclass(found)):
        return None
    try:
        path = pathlib.Path(inspect.getfile(found)).resolve()
        lines, first = inspect.getsourcelines(found)
    except (OSError, TypeError):  # made when the program runs
        return None
    if not path.is_relative_to(top / "regjax"):
        return None
    place = path.relative_to(top).as_posix()
    return f"{repository}/blob/main/{place}#L{first}-L{first + len(lines) - 1}"

"""What `--help` prints: the options in groups, those of a method only if it is chosen."""

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import shutil
import textwrap
import typing
from pathlib import Path
from typing import Any

from regjax.experiments import _settings
from regjax.experiments._options import choices, option

PROGRAM = "python -m regjax"

# Lines longer than this are hard to read, and narrower terminals are rare.
_MOST_COLUMNS, _LEAST_COLUMNS = 100, 60
# Choices that are longer stand in the text.
_LONGEST_METAVAR = 34
_COLUMN = 26
_GROUPS = {
    "data": ("data", "data_dir", "num_train", "num_test"),
    "model": ("model", "width", "depth", "normalization", "init", "dtype"),
    "training": (
        "optimizer", "learning_rate", "momentum", "weight_decay", "transformation", "epochs",
        "batch_size", "seed", "checkpoint_seconds", "resume", "device_bytes",
    ),
    "monitor": ("monitor", "monitor_every", "monitor_examples"),
    "comparison": ("compare", "seeds"),
    "output": ("out", "overwrite", "figure", "figure_width", "cache_dir"),
}  # fmt: skip
_REST = "analysis"
_EXAMPLES = {
    "train": (
        "{program} train --model convnet --normalization batch --epochs 10",
        "{program} train --transformation sam --sam.rho 0.1 --out runs/sam",
        "{program} train --data mine.npz --resume --epochs 60",
    ),
    "spectrum": (
        "{program} spectrum",
        "{program} spectrum --compare sgd sam sam,rho=0.2 --seeds 5",
        "{program} spectrum --checkpoint runs/sam --blocks layers --geometry",
        "{program} spectrum --transformation sam --help",
    ),
    "landscape": (
        "{program} landscape --points 31",
        "{program} landscape --compare none batch",
        "{program} landscape --checkpoint runs/sam --span 0.5",
    ),
}
_STATUS = (
    "exit status: 0 done; 1 done, but a network did not learn; 2 refused, and one\n"
    "line says what to change; 70 a fault of regjax; 130 interrupted."
)


def root_help(commands: dict[str, type[_settings.TrainSettings]]) -> str:
    """Returns the help without a command: what the commands are for, and examples."""
    what = "Train networks and see the curvature and the shape of their loss."
    examples = [lines[0] for lines in _EXAMPLES.values()]
    parser = _parser(f"{PROGRAM} COMMAND [OPTIONS]", what, examples)
    group = parser.add_argument_group("commands")
    for name, kind in commands.items():
        group.add_argument(name, help=_escaped(_what_for(kind)))
    _add_general(parser)
    return parser.format_help() + f"\n{PROGRAM} COMMAND --help lists the options of a command.\n"


def _what_for(kind: type) -> str:
    """Returns the first paragraph of a docstring, which is for the command line too."""
    return (inspect.getdoc(kind) or "").partition("\n\n")[0]


def command_help(command: str, settings: _settings.TrainSettings) -> str:
    """Returns the help of a command.

    Args:
      command: its name.
      settings: the options given beside `--help`: of the methods' own options only those of the
        chosen methods are listed; the values are shown as the defaults.
    """
    usage = f"{PROGRAM} {command} [OPTIONS]"
    parser = _parser(usage, _what_for(type(settings)), _EXAMPLES[command])
    for title, names in _grouped(settings).items():
        method = title.removeprefix("method ")
        about = inspect.getdoc(getattr(settings, method)) or "" if method != title else ""
        about = textwrap.fill(" ".join(about.split()), _width() - 2)
        group = parser.add_argument_group(title, about or None)
        for name in names:
            _add_option(group, name, settings)
    _add_general(parser)
    return parser.format_help()


def _grouped(settings: _settings.TrainSettings) -> dict[str, list[str]]:
    """Returns the names of the options to be listed, by the title of their group."""
    names = list(_settings.option_types(type(settings)))
    titles = {name: title for title, names in _GROUPS.items() for name in names}
    order = ["data", "model", "training", *_settings.methods(settings)]
    order += [_REST, "monitor", "comparison", "output"]
    result: dict[str, list[str]] = {title: [] for title in order}
    for name in names:
        method = name.partition(".")[0] if "." in name else None
        title = titles.get(name, _REST) if method is None else method
        if title in result:
            result[title].append(name)
    for title, named in _GROUPS.items():
        result[title].sort(key=named.index)
    chosen = {name: f"method {name}" for name in _settings.methods(settings)}
    return {chosen.get(title, title): names for title, names in result.items() if names}


def _add_option(group: Any, name: str, settings: _settings.TrainSettings) -> None:
    outer, _, inner = name.partition(".")
    owner = getattr(settings, outer) if inner else settings
    value = getattr(owner, inner or outer)
    hint = _settings.option_types(type(settings))[name]
    texts: dict[str, str] = _documentation(type(owner))  # type: ignore[arg-type]
    text, flags = texts[inner or outer], [option(name)]
    # A union with None: the text says what the default is.
    kind = next(part for part in (*typing.get_args(hint), hint) if part is not type(None))
    metavar: str | None = {int: "INT", float: "FLOAT", str: "NAME", Path: "PATH"}.get(kind, "NAME")
    if words := choices(hint):
        braced = f"{{{','.join(words)}}}"
        metavar = braced if len(braced) <= _LONGEST_METAVAR else "NAME"
        text += "" if metavar == braced else f" One of: {', '.join(words)}."
    if isinstance(value, bool):
        metavar = None
        if value:
            flags = [option(f"{outer}.no_{inner}" if inner else f"no_{outer}")]
            text = f"Turn off: {text[0].lower()}{text[1:]}"
    elif isinstance(value, tuple):
        metavar = "ITEM"
    elif value is not None:
        text += f" [{_short(value)}]"
    many = {"nargs": "*"} if isinstance(value, tuple) else {}
    action = {"action": "store_true"} if metavar is None else {"metavar": metavar, **many}
    group.add_argument(*flags, help=_escaped(text), **action)


def _short(value: Any) -> str:
    """Returns a default as one writes it: 2147483648, 0.0001, sgd."""
    return f"{value:g}" if isinstance(value, float) else str(value)


@functools.cache
def _documentation(settings_type: type) -> dict[str, str]:
    """Returns the texts under the fields of a class of options, by name, each on one line."""
    texts: dict[str, str] = {}
    for kind in reversed(settings_type.__mro__):
        if not dataclasses.is_dataclass(kind):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        for field, text in itertools.pairwise(typing.cast(ast.ClassDef, body).body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                name = typing.cast(ast.Name, field.target).id
                texts[name] = " ".join(str(ast.literal_eval(text.value)).split())
    return texts


def _parser(usage: str, description: str, examples: Any) -> argparse.ArgumentParser:
    """Returns a parser that prints and parses nothing."""
    lines = "\n".join(f"  {line.format(program=PROGRAM)}" for line in examples)
    width = _width()
    return argparse.ArgumentParser(
        usage=usage,
        description=textwrap.fill(description, width),
        epilog=f"examples:\n{lines}\n\n{_STATUS}",
        formatter_class=_formatter,
        add_help=False,
    )


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, width=_width(), max_help_position=_COLUMN)


def _width() -> int:
    return min(max(shutil.get_terminal_size().columns, _LEAST_COLUMNS), _MOST_COLUMNS)


def _add_general(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("general")
    group.add_argument("-h", "--help", action="store_true", help="Print this text.")
    group.add_argument("--version", action="store_true", help="Print the versions.")


def _escaped(text: str) -> str:
    """Returns a text that argparse does not fill in."""
    return text.replace("%", "%%")

"""Makes the options and `--help` of a command from its signature and docstring.

Defaults and meanings are written only once, at the function. Config files and the command line set
the same options.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import docstring_parser
import yaml
from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter

__all__ = ["parser_of", "values_of"]

NOTHING = "null"
"""What command lines and YAML call None."""


class _Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Shows the lines of examples as they are, and values and types without Python's notation."""

    def _expand_help(self, action: argparse.Action) -> str:
        shown = re.sub(r"\bNone\b", NOTHING, super()._expand_help(action))
        shown = re.sub(r"(, )?type: (Optional\[)?Literal\[[^\]]*\]+", "", shown)
        shown = re.sub(r"<class '(\w+)'>", r"\1", shown)
        return shown.replace("(, default:", "(default:")


def parser_of(
    command: str,
    run: Callable[..., int],
    *,
    example: str,
    classes: Mapping[str, tuple[type, set[str]]] | None = None,
    hidden: Collection[str] = (),
) -> ArgumentParser:
    """The parser of a command.

    Args:
        command: Its name.
        run: Its function, with a docstring in Google's style. Positional parameters become
            positional arguments. One that is a list takes all that are given.
        example: A command line, shown at the end of the help.
        classes: Keyword parameters of ``run`` whose options are the fields of a class. Each has the
            class and the names that are left out.
        hidden: Parameters of ``run`` that are not options.

    Returns:
        The parser, which raises `argparse.ArgumentError` in place of exiting.
    """
    document = docstring_parser.parse(run.__doc__ or "")
    summary = (document.short_description or "").rstrip(".")  # jsonargparse's title of the group
    meanings = {p.arg_name: " ".join((p.description or "").split()) for p in document.params}
    parser = ArgumentParser(
        prog=f"ensembles {command}",
        description=document.description,
        epilog=f"example:\n  {example}",
        formatter_class=_Formatter,
        exit_on_error=False,
        allow_abbrev=False,  # an option that is added later must not change what a script means
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file that sets options by the names below. If an option is given several times, "
        "in files or on the command line, the last one counts.",
    )
    ours: set[str] = {*(classes or {}), *hidden}
    flags: list[str] = []
    several: list[str] = []
    for name, parameter in inspect.signature(run, eval_str=True).parameters.items():
        if name in ours:
            continue
        if parameter.annotation is bool:
            flags.append(name)
        elif parameter.annotation == list[str] and parameter.kind != parameter.KEYWORD_ONLY:
            several.append(name)
    parser.add_function_arguments(run, as_positional=True, skip={*ours, *flags, *several})
    (group,) = (g for g in parser._action_groups if g.title == summary)
    group.title = "options of this command"
    for name in several:
        group.add_argument(name, nargs="+", help=meanings[name])
    for name in flags:
        # As argparse has flags, and with a value as in config files.
        group.add_argument(
            f"--{name}", action=ActionYesNo, nargs="?", default=False, help=meanings[name]
        )
    for name, (kind, left_out) in (classes or {}).items():
        parser.add_class_arguments(kind, name, skip=left_out)
    return parser


def values_of(parser: ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """The values of a command line, for the command's function.

    Raises:
        argparse.ArgumentError: If an option is unknown, missing, or of another type.
        ValueError: If a class refuses its values.
    """
    for path in _config_files(arguments):
        _require_known(parser, path)
    _require_null(parser, arguments)
    try:
        parsed = parser.parse_args(list(arguments))
    except argparse.ArgumentError as error:
        raise argparse.ArgumentError(None, f"{error}{_meant(parser, arguments)}") from error
    values = parser.instantiate(parsed)
    return {name: value for name, value in vars(values).items() if name != "config"}


def _require_null(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Refuses None for an option that may be null, because it would be read as text.

    Raises:
        argparse.ArgumentError: It names the option, and what to write.
    """
    options = parser._option_string_actions
    for argument, following in pairwise([*arguments, ""]):
        name, equals, value = argument.partition("=")
        if _is_none(value if equals else following, options.get(name)):
            raise argparse.ArgumentError(None, f"write {name} {NOTHING} in place of {name} None")


def _is_none(value: object, action: argparse.Action | None) -> bool:
    """Whether a value is the text None, for an option that may be null."""
    return value == "None" and NoneType in get_args(getattr(action, "_typehint", None))


def _meant(parser: ArgumentParser, arguments: Sequence[str]) -> str:
    """The options that are nearest to the first unknown one."""
    options = parser._option_string_actions
    for argument in arguments:
        name, _, _ = argument.partition("=")
        if name.startswith("--") and name not in options:
            return _nearest(name, options)
    return ""


def _nearest(name: str, names: Collection[str]) -> str:
    nearest = get_close_matches(name, names, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _config_files(arguments: Sequence[str]) -> Iterator[Path]:
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config":
            given = value if equals else "".join(arguments[place + 1 : place + 2])
            if Path(given).is_file():  # what is missing is told by the parser
                yield Path(given)


def _require_known(parser: ArgumentParser, path: Path) -> None:
    """Refuses a wrong config file, and names the file, which the parser does not do.

    Raises:
        argparse.ArgumentError: If it is not YAML, has an unknown option, or has the text None.
    """
    try:
        given = yaml.safe_load(path.read_bytes().decode("utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise argparse.ArgumentError(None, f"{path} is not YAML: {error}") from error
    if not isinstance(given, dict):
        raise argparse.ArgumentError(
            None, f"{path} holds no options: write a value for each name, such as seed: 1"
        )
    actions = {action.dest: action for action in parser._actions}
    for name, value in _options(given, actions):
        if name not in actions:
            raise argparse.ArgumentError(
                None, f"{path}: there is no option {name}{_nearest(name, actions)}"
            )
        if _is_none(value, actions[name]):
            raise argparse.ArgumentError(None, f"{path}: {name}: write {NOTHING} in place of None")


def _options(
    given: Mapping[Any, Any], names: Collection[str], within: str = ""
) -> Iterator[tuple[str, Any]]:
    """The options of a config file with their values; options of a class are nested."""
    for key, value in given.items():
        name = f"{within}{key}"
        if isinstance(value, dict) and any(known.startswith(f"{name}.") for known in names):
            yield from _options(value, names, f"{name}.")
        else:
            yield name, value

"""Command lines of this project: a YAML file plus flags that override it (TRL's `TrlParser` convention).

Unknown keys, values of the wrong type and unreadable files end the command with one line that says what to change.
"""

import contextlib
import dataclasses
import difflib
import json
import logging
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from rewards.files import write_atomically


class ConfigError(ValueError):
    """A configuration that can't be used; the message names the file, the key and the value."""


def parse_config(*dataclass_types: type[Any], args: Sequence[str] | None = None, description: str | None = None) -> Any:
    """Read `--config file.yaml` and flags into dataclasses.

    Args:
        dataclass_types: One or more; a key may belong to any of them. Fields of classes defined in this project are
            checked against their annotations; others (TRL's) check themselves.
        args: Command line; `sys.argv[1:]` by default.
        description: Shown by `--help`.

    Returns:
        One instance, or a tuple of them if several classes were given.

    Raises:
        ConfigError: If the file is missing or no YAML mapping, a key is unknown or a value has the wrong type.
    """
    with contextlib.redirect_stdout(sys.stderr):  # transformers prints when wandb is offline
        from trl import TrlParser

    args = list(sys.argv[1:] if args is None else args)
    path = _config_path(args)
    where = path or "command line"
    if path is not None:
        mapping = check_config_file(path, *dataclass_types)
        # argparse converts text as if it were typed, but passes other values on as they are. They are checked before
        # the dataclasses' own checks compare them with numbers.
        given = {key: value for key, value in mapping.items() if not isinstance(value, str)}
        for cls in dataclass_types:
            _check_types(cls, given, path)
    parser = TrlParser(cast(Any, list(dataclass_types)), description=description)
    parser.error = _refuse
    try:
        values = parser.parse_args_and_config(args)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    for value in values:
        _check_types(type(value), vars(value), where)
    return values[0] if len(values) == 1 else values


def from_json(name: str, value: Any, kind: type[Any]) -> Any:
    """An option that is a mapping or a list in a YAML file, and JSON text on a command line.

    Args:
        name: Of the option, for messages.
        value: As given.
        kind: `dict` or `list`.

    Raises:
        ValueError: Neither that, nor JSON text of it.
    """
    what = {dict: "mapping", list: "list"}[kind]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"`{name}` must be a {what}, or one as JSON text, but is {value!r} ({error}).") from error
    if not isinstance(value, kind):
        raise ValueError(f"`{name}` must be a {what}, but is {value!r}.")
    return value


def check_config_file(path: Path, *dataclass_types: type[Any]) -> dict[str, Any]:
    """The mapping in a YAML file, every key of which is a field of one of the dataclasses (or `env`).

    Raises:
        ConfigError: Naming the file, the key and the nearest known key.
    """
    try:
        mapping = _UniqueKeyLoader(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise ConfigError(f"Can't read the config file {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path} must hold a YAML mapping of options, but holds {type(mapping).__name__}.")
    known = {field.name for cls in dataclass_types for field in dataclasses.fields(cls)} | {"env"}
    for key in mapping:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else " See --help for all of them."
            raise ConfigError(f"{path}: unknown key `{key}`.{hint}")
    return mapping


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML forbids a key that stands twice in a mapping; PyYAML takes the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.YAMLError(f"the key `{twice}` stands more than once")
        return super().construct_mapping(node, deep)


def check_nested(where: str, options: Any, cls: type[Any], set_here: Collection[str] = ()) -> None:
    """Check a mapping of another command's options that stands inside a configuration.

    Args:
        where: Its key, for messages.
        options: What stands there.
        cls: That command's dataclass.
        set_here: Fields that the outer command sets itself.

    Raises:
        ValueError: No mapping, an unknown key (with the nearest known one), one of `set_here`, or a wrong type.
    """
    if not isinstance(options, Mapping):
        raise ValueError(f"`{where}` must be a mapping of options, but is {options!r}.")
    known = {field.name for field in dataclasses.fields(cls)} - set(set_here)
    hints = get_type_hints(cls)
    for key, value in options.items():
        if key in set_here:
            raise ValueError(f"`{where}.{key}` is set by this command; leave it out.")
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else f" It may hold {', '.join(sorted(known))}."
            raise ValueError(f"`{where}`: unknown option `{key}`.{hint}")
        try:
            TypeAdapter(hints[key]).validate_python(value, strict=True)
        except ValidationError as error:
            message = error.errors(include_url=False)[0]["msg"]
            raise ValueError(f"`{where}.{key}` is {value!r}: {message}.") from error


def save_config(path: Path, *configs: Any) -> None:
    """Write resolved configurations as one YAML mapping (atomically); keys that hold a secret are left out."""
    merged: dict[str, Any] = {}
    for config in configs:
        merged |= config.to_dict() if hasattr(config, "to_dict") else dataclasses.asdict(config)
    merged = {key: value for key, value in merged.items() if not key.endswith("_token") and _is_plain(value)}
    write_atomically(path, yaml.safe_dump(merged, sort_keys=False, allow_unicode=True).encode())


def run_command(main: Any, *dataclass_types: type[Any], errors: tuple[type[Exception], ...] = ()) -> None:
    """Entry point of a command: parse, call `main`, turn expected errors into one line and exit code 2.

    Args:
        main: Called with one config per dataclass; its module's docstring is the `--help` text.
        dataclass_types: See `parse_config`.
        errors: Exceptions of `main` that are the user's to mend; others keep their traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it reports every request
    try:
        configs = parse_config(*dataclass_types, description=sys.modules[main.__module__].__doc__)
        main(*configs) if isinstance(configs, tuple) else main(configs)
    except (ConfigError, *errors) as error:
        if os.environ.get("T2I_ALIGN_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _refuse(message: str) -> NoReturn:
    """Stands in for argparse's own way, which prints every option before the error."""
    raise ConfigError(f"command line: {message} (see --help).")


def _config_path(args: list[str]) -> Path | None:
    for i, arg in enumerate(args):
        if arg.startswith("--config="):  # TrlParser knows only the two-word form
            args[i : i + 1] = ["--config", arg.removeprefix("--config=")]
    if "--config" not in args:
        return None
    index = args.index("--config")
    if index + 1 == len(args):
        raise ConfigError("`--config` needs the path of a YAML file after it.")
    return Path(args[index + 1])


def _check_types(cls: type[Any], values: dict[str, Any], where: Path | str) -> None:
    """Check options that our own dataclasses define; those of TRL and transformers check themselves."""
    own = [base for base in cls.__mro__ if base.__module__.split(".")[0] not in ("trl", "transformers")]
    names = {name for base in own for name in vars(base).get("__annotations__", {})}
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name not in values or field.name not in names:
            continue
        value, hint = values[field.name], hints[field.name]
        if field.default is None:
            hint = hint | None
        try:
            TypeAdapter(hint).validate_python(value, strict=True)  # not strict, `true` and 2.0 would pass for int
        except ValidationError as error:
            message = error.errors(include_url=False)[0]["msg"]
            raise ConfigError(f"{where}: `{field.name}` is {value!r}: {message}.") from error


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return value is None or isinstance(value, bool | int | float | str)

"""Recipe < file < section.key=value, validated as a whole each time."""

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fieldmark.config.schema import RunConfig, Section
from fieldmark.errors import ConfigError, suggestion


def override(config: RunConfig, settings: Iterable[str]) -> RunConfig:
    """Return `config` with each "section.key=value" applied, validated as a whole.

    Values are TOML (numbers, true, false, lists, quoted text); anything else is taken as text.
    Setting one unit of a duration (train.steps) clears the others (train.epochs).

    Raises:
        ConfigError: a setting that is not section.key=value, an unknown key, or a bad value.
    """
    changes: dict[str, dict[str, Any]] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        section, dot, key = path.strip().partition(".")
        if not (equals and dot and section and key):
            raise ConfigError(
                f"a setting must be section.key=value. Got {setting!r}. Example: train.epochs=2."
            )
        name, *rest = key.split(".")
        target = changes.setdefault(section, {})
        for part in rest:  # model.args.widths=[...] reaches into a table
            target = target.setdefault(name, {})
            name = part
        target[name] = _parse(text.strip())
    return _merged(config, changes)


def load_toml(path: Path, base: RunConfig | None = None) -> RunConfig:
    """Return the configuration a TOML file describes, over `base` where one is given.

    Raises:
        ConfigError: the file is not TOML, or what it says is not a valid configuration.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} must be a readable TOML file. {error}.") from error
    content.pop("recipe", None)
    if base is None:
        _check_keys(content)
        return _validated(content)
    return _merged(base, content)


def from_json(content: Mapping[str, Any]) -> RunConfig:
    """Return the configuration that a run stored."""
    return _validated(dict(content))


def _merged(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    _check_keys(changes)
    merged = config.model_dump()
    for section, values in changes.items():
        if not isinstance(values, Mapping):
            merged[section] = values
            continue
        for group in RunConfig.model_fields[section].annotation.units:  # type: ignore[union-attr]
            if any(values.get(name) for name in group):
                merged[section].update(dict.fromkeys(group, 0))
        for key, value in values.items():
            old = merged[section].get(key)
            merges = isinstance(old, dict) and isinstance(value, Mapping)
            merged[section][key] = {**old, **value} if merges else value
    return _validated(merged)


def _check_keys(changes: Mapping[str, Any]) -> None:
    for section, values in changes.items():
        field = RunConfig.model_fields.get(section)
        if field is None:
            known = [name for name in RunConfig.model_fields if name != "name"]
            raise ConfigError(
                f"config section {section!r} does not exist.{suggestion(section, known)}"
            )
        kind = field.annotation
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            continue
        if not isinstance(values, Mapping):
            raise ConfigError(f"config section {section!r} must be a table. Got {values!r}.")
        for key in values:
            if key not in kind.model_fields:
                known = [f"{section}.{name}" for name in kind.model_fields]
                raise ConfigError(
                    f"config key '{section}.{key}' does not exist."
                    f"{suggestion(f'{section}.{key}', known)}"
                )


def _validated(content: Mapping[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from error


def _sentence(error: ValidationError) -> str:
    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"] if part != "literal")
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "value_error":
            parts.append(f"{message}.")
        elif item["type"] == "missing":
            parts.append(f"{where} must be set.")
        else:
            parts.append(f"{where}: {message}. Got {item['input']!r}.")
    return " ".join(parts)


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text

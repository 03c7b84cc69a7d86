"""Recipe < file < section.key=value, validated as a whole each time."""

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fieldmark.config.schema import RunConfig
from fieldmark.config.section import Section
from fieldmark.errors import ConfigError, suggestion

Change = tuple[str, tuple[str, ...], Any]
"""Section, the path of keys in it, value."""


def override(config: RunConfig, settings: Iterable[str]) -> RunConfig:
    """Return `config` with each "section.key=value" applied, validated as a whole.

    Values are TOML (numbers, true, false, lists, quoted text); anything else is taken as text.
    Setting one unit of a duration (train.steps) clears the others (train.epochs), and another
    model.arch, optim.name or schedule.name what belongs to the one before (model.args, optim.args,
    schedule.step_epochs).

    Raises:
        ConfigError: a setting that is not section.key=value, an unknown key, or a bad value.
    """
    changes: list[Change] = []
    for setting in settings:
        path, equals, text = setting.partition("=")
        section, *keys = path.strip().split(".")
        if not (equals and section and keys and all(keys)):
            raise ConfigError(
                f"a setting must be section.key=value. Got {setting!r}. Example: train.epochs=2."
            )
        changes.append((section, tuple(keys), _parse(text.strip())))
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
    for section, values in content.items():
        _check_section(section)
        if not isinstance(values, Mapping):
            raise ConfigError(f"config section {section!r} must be a table. Got {values!r}.")
        for key in values:
            _check_key(section, key)
    if base is None:
        return _validated(content)
    return _merged(
        base,
        [
            (section, (key,), value)
            for section, keys in content.items()
            for key, value in keys.items()
        ],
    )


def from_json(content: Mapping[str, Any]) -> RunConfig:
    """Return the configuration that a run stored."""
    whole = {
        section: without_idle(_check_section(section), values) if section != "name" else values
        for section, values in content.items()
        if section in RunConfig.model_fields
    }
    return _validated({**content, **whole})


def without_idle(kind: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a section with what does nothing beside the others at its default.

    Runs were stored before such values were refused.
    """
    defaults = {name: field.get_default() for name, field in kind.model_fields.items()}
    return dict(values) | kind.idle(defaults | dict(values))


def _merged(config: RunConfig, changes: Sequence[Change]) -> RunConfig:
    merged = config.model_dump()
    whole = {(section, keys[0]) for section, keys, _ in changes if len(keys) == 1}
    for section, keys, value in changes:
        kind = _check_section(section)
        _check_key(section, keys[0])
        for name, nothing in kind.clears(keys[0]).items():
            # A part of a table is set in an empty one: the rest was of what is replaced here.
            if (section, name) not in whole and merged[section][keys[0]] != value:
                merged[section][name] = nothing
    for section, keys, value in changes:
        target = merged[section]
        for key in keys[:-1]:  # model.args.widths=[...] reaches into a table
            if not isinstance(target.get(key), dict):
                raise ConfigError(f"{section}.{'.'.join(keys[:-1])} must be a table. It is not.")
            target[key] = dict(target[key])
            target = target[key]
        target[keys[-1]] = value
    given = {(section, keys[0]) for section, keys, _ in changes}
    for section in {section for section, _ in given}:
        for name, default in _check_section(section).idle(merged[section]).items():
            if (section, name) not in given:  # it was of what is switched off here
                merged[section][name] = default
    found = _validated(merged)
    _must_be_seen(found, [keys[0] for section, keys, _ in changes if section == "augment"])
    return found


def _must_be_seen(config: RunConfig, given: Sequence[str]) -> None:
    """Refuse keys of `augment` that were given and do nothing: a policy chooses in their place."""
    augment = config.augment
    if augment.policy in ("custom", "none"):
        return
    for name in given:
        value = getattr(augment, name)
        if name != "policy" and value == type(augment).model_fields[name].default:
            raise ConfigError(
                f"augment.{name}={json.dumps(value)} takes nothing from augment.policy="
                f"{augment.policy}, which chooses all keys that are at their defaults. Set "
                "augment.policy=custom, and the keys that you want."
            )


def _check_section(section: str) -> type[Section]:
    field = RunConfig.model_fields.get(section)
    kind = field.annotation if field is not None else None
    if not (isinstance(kind, type) and issubclass(kind, Section)):
        known = [name for name in RunConfig.model_fields if name != "name"]
        raise ConfigError(f"config section {section!r} does not exist.{suggestion(section, known)}")
    return kind


def _check_key(section: str, key: str) -> None:
    fields = _check_section(section).model_fields
    if key not in fields:
        known = [f"{section}.{name}" for name in fields]
        near = suggestion(f"{section}.{key}", known)
        raise ConfigError(f"config key '{section}.{key}' does not exist.{near}")


def _validated(content: Mapping[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from error


def _sentence(error: ValidationError) -> str:
    parts = []
    refused: dict[str, list[str]] = {}  # a key that takes one thing or another is refused by each
    given: dict[str, Any] = {}
    for item in error.errors():
        # The key, and where in a list; what follows in words are pydantic's names of types.
        loc = item["loc"]
        where = ".".join(
            str(part) for place, part in enumerate(loc) if place < 2 or isinstance(part, int)
        )
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "value_error":
            parts.append(f"{message}.")
        elif item["type"] == "missing":
            parts.append(f"{where} must be set.")
        else:
            shown = message.removeprefix("Input should be ") if where in refused else message
            refused.setdefault(where, []).append(shown)
            given[where] = item["input"]
    parts += [
        f"{where}: {', or '.join(reasons)}. Got {given[where]!r}."
        for where, reasons in refused.items()
    ]
    return " ".join(parts)


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text

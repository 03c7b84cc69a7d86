"""The values a sweep tries for a key: a range, or a choice."""

import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fieldmark.config.load import override
from fieldmark.config.schema import RunConfig
from fieldmark.config.section import Section
from fieldmark.errors import ConfigError

FORMS = "1e-4..1e-1, log:1e-4..1e-1, int:2..8, [64,128] or choice:[[8,16],[16,32]]"
DIGITS = 4  # significant ones of a tried value, so that the command that repeats it can be read

_PREFIXES = ("log", "int", "choice")
_BARE = re.compile(r"[A-Za-z_][\w./:-]*")  # text that TOML cannot take for anything else
_TOML_WORDS = {"true", "false", "inf", "nan"}


@dataclass(frozen=True, slots=True)
class Space:
    """What one key may be. `values` are those of a choice; low and high belong to a range."""

    key: str  # section.key
    text: str  # as it was written
    kind: Literal["uniform", "log", "int", "choice"]
    low: float = 0.0
    high: float = 0.0
    values: tuple[Any, ...] = ()

    def value(self, drawn: Any) -> Any:
        """Return what is tried for a drawn number: 4 digits of it, inside the range."""
        if self.kind in ("uniform", "log"):
            return min(max(float(f"{drawn:.{DIGITS}g}"), self.low), self.high)
        return drawn

    def setting(self, drawn: Any) -> str:
        """Return "section.key=value" as `override` reads it."""
        return f"{self.key}={to_text(self.value(drawn))}"

    def examples(self) -> tuple[Any, ...]:
        """Return the ends of a range and a number between them, or all values of a choice."""
        if self.kind == "choice":
            return self.values
        if self.kind == "int":
            return int(self.low), int(self.high)
        return self.low, self.low + (self.high - self.low) * 0.618, self.high


def split_settings(config: RunConfig, texts: Iterable[str]) -> tuple[list[str], list[Space]]:
    """Return (the settings with one value, the spaces), each known to fit `config`.

    A list is a choice, unless the key itself takes lists: then it is a value, and a choice among
    lists is written choice:[...].

    Raises:
        ConfigError: a range that is none, values the key does not take, or a key with two of them.
    """
    fixed: list[str] = []
    spaces: dict[str, Space] = {}
    for text in texts:
        key, _, value = (part.strip() for part in text.partition("="))
        is_value = _toml_list(value) is not None and _takes(config, text)
        space = None if is_value else parse_space(key, value)
        if key in spaces or (space and key in {other.partition("=")[0].strip() for other in fixed}):
            raise ConfigError(
                f"{key} must be given once where it has a space. Got {text!r} too. Leave one out."
            )
        if space is None:
            fixed.append(text)
        else:
            spaces[key] = space
    base = override(config, fixed)
    for space in spaces.values():
        for owners in _owners(base, space, spaces):
            _check(base, space, owners)
    return fixed, list(spaces.values())


def parse_space(key: str, text: str) -> Space | None:
    """Return the space that a text describes, or None for a single value.

    Raises:
        ConfigError: it looks like a space and is none; the message has the right forms.
    """
    prefix, colon, rest = text.partition(":")
    if not colon or prefix not in _PREFIXES:
        prefix, rest = "", text
    if prefix == "choice" or (not prefix and rest.startswith("[")):
        return _choice(key, text, rest)
    low, dots, high = rest.partition("..")
    ends = [_number(end) for end in (low, high)]
    if not prefix and (not dots or ends == [None, None]):
        return None  # a plain value, such as a path with .. in it
    if None in ends or not dots:
        raise _wrong(key, text, "be a range of two numbers")
    a, b = (float(end) for end in ends if end is not None)
    if not a < b:
        raise _wrong(key, text, "rise from a lower to a higher number")
    if prefix == "log" and a <= 0:
        raise _wrong(key, text, "begin above 0 with log:")
    if prefix == "int":
        if not (a.is_integer() and b.is_integer()):
            raise _wrong(key, text, "have whole numbers with int:")
        return Space(key, text, "int", a, b)
    return Space(key, text, "log" if prefix == "log" else "uniform", a, b)


def to_text(value: Any) -> str:
    """Return a value as `override` reads it: TOML, or bare text where that is unambiguous."""
    if isinstance(value, str) and _BARE.fullmatch(value) and value not in _TOML_WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)


def _choice(key: str, text: str, listed: str) -> Space:
    values = _list(listed)
    if values is None:
        raise _wrong(key, text, "be a list of numbers, texts or lists")
    if len(values) < 2:
        raise _wrong(key, text, "offer at least two values")
    if len({json.dumps(value) for value in values}) < len(values):
        raise _wrong(key, text, "list each value once")
    return Space(key, text, "choice", values=tuple(values))


def _list(text: str) -> list[Any] | None:
    """A TOML list; or bare words between brackets, which a shell leaves of quoted ones."""
    listed = _toml_list(text)
    if listed is not None:
        return listed if _is_plain(listed) else None
    if not (text.startswith("[") and text.endswith("]")):
        return None
    words = [word.strip() for word in text[1:-1].split(",")]
    return words if all(_BARE.fullmatch(word) for word in words) else None


def _toml_list(text: str) -> list[Any] | None:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return None
    return value if isinstance(value, list) else None


def _is_plain(value: Any) -> bool:
    """Whether JSON writes the value as TOML does: no tables, no dates."""
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return isinstance(value, bool | int | float | str)


def _owners(base: RunConfig, space: Space, spaces: Mapping[str, Space]) -> list[list[str]]:
    """Return the settings beside which a key's values must fit, one list after the other.

    Those are the values, in this sweep, of a key without which it means nothing.
    """
    section, _, key = space.key.partition(".")
    found_section = getattr(base, section, None)
    needs = found_section.needs.get(key, ()) if isinstance(found_section, Section) else ()
    names = [f"{section}.{owner.partition('=')[0]}" for owner in needs]
    found = [
        [f"{name}={to_text(value)}"]
        for name in names
        if name in spaces
        for value in spaces[name].examples()
    ]
    return found or [[]]


def _check(base: RunConfig, space: Space, owners: list[str]) -> None:
    """Refuse values that the key does not take before hours are spent on others."""
    for value in space.examples():
        setting = f"{space.key}={to_text(value)}"
        try:
            override(base, [*owners, setting])
        except ConfigError as error:
            whole = isinstance(value, float) and not value.is_integer()
            if whole and _takes(base, f"{space.key}={math.ceil(value)}"):
                raise ConfigError(
                    f"{space.key} takes whole numbers. Got {space.text!r}. "
                    f"Write {space.key}=int:{math.ceil(space.low)}..{math.floor(space.high)}."
                ) from error
            raise


def _takes(config: RunConfig, setting: str) -> bool:
    try:
        override(config, [setting])
    except ConfigError:
        return False
    return True


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _wrong(key: str, text: str, rule: str) -> ConfigError:
    return ConfigError(f"the space of {key} must {rule}. Got {text!r}. Write {FORMS}.")

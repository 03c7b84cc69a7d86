"""What every section of a configuration is. Plain values only: nothing here imports torch."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

Frac = Field(default=0.0, ge=0, le=1)


class Section(BaseModel):
    """Base of every section: immutable, and a key that does not exist is an error."""

    # JSON has no infinity: a configuration with one would not reload equal.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Groups of keys that say the same thing in different units: setting one clears the others.
    units: ClassVar[tuple[tuple[str, ...], ...]] = ()
    # A key that names something -> the keys that belong to that thing, with what empties them.
    arguments: ClassVar[dict[str, dict[str, Any]]] = {}
    # A key -> what must be set for it to mean anything: one of several keys, or a key's value.
    needs: ClassVar[dict[str, tuple[str, ...]]] = {}

    @classmethod
    def clears(cls, key: str) -> dict[str, Any]:
        """Return the keys that lose their meaning when `key` is set, with what empties them."""
        others = {name: 0 for group in cls.units if key in group for name in group if name != key}
        return others | cls.arguments.get(key, {})

    @classmethod
    def idle(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys that mean nothing beside these values, with their defaults."""
        return {
            key: cls.model_fields[key].default
            for key, owners in cls.needs.items()
            if not any(_is_on(values, owner) for owner in owners)
        }

    @model_validator(mode="after")
    def _has_no_idle_key(self) -> Self:
        section = type(self).__name__.removesuffix("Config").lower()
        for key, default in self.idle(self.__dict__).items():
            value = getattr(self, key)
            if value != default:
                owners = " or ".join(f"{section}.{owner}" for owner in self.needs[key])
                raise ValueError(
                    f"{section}.{key} means nothing without {owners}. Got {value}: set that, too, "
                    f"or leave it at {default}"
                )
        return self

    def _set_units(self, group: tuple[str, ...]) -> list[str]:
        return [name for name in group if getattr(self, name)]


def _is_on(values: Mapping[str, Any], owner: str) -> bool:
    key, _, wanted = owner.partition("=")
    return str(values[key]).lower() == wanted if wanted else bool(values[key])

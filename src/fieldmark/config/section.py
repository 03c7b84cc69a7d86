"""What every section of a configuration is. Plain values only: nothing here imports torch."""

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

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

    @classmethod
    def clears(cls, key: str) -> dict[str, Any]:
        """Return the keys that lose their meaning when `key` is set, with what empties them."""
        others = {name: 0 for group in cls.units if key in group for name in group if name != key}
        return others | cls.arguments.get(key, {})

    def _set_units(self, group: tuple[str, ...]) -> list[str]:
        return [name for name in group if getattr(self, name)]

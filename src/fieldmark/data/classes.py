"""Labels are matched by name, never by index."""

import re
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from fieldmark.data.labelled import Labels
from fieldmark.errors import DataError, suggestion

_AMBIGUOUS: Final = -1
_MOST_LISTED = 5


def match_classes(
    data_class_names: Sequence[str],
    model_class_names: Sequence[str],
    model_descriptions: Sequence[str] | None = None,
) -> Labels:
    """Return, for each class of the data, the index of the model's class of that name.

    The data may have fewer classes, or another order. A name matches a model's class by being
    equal to its name, else to its description, else to one of the comma-separated names in its
    description ("goldfish" of "goldfish, Carassius auratus", underscores read as spaces). The
    folder names of ImageNet (n01443537) match classes that are called by the synset's words.

    Raises:
        DataError: a class of the data has no counterpart, or two have the same one.
    """
    tiers = _tiers(model_class_names, model_descriptions)
    matched = np.array([_find(name, tiers) for name in data_class_names], dtype=np.int64)
    missing = [name for name, index in zip(data_class_names, matched, strict=True) if index < 0]
    if missing:
        known = [*model_class_names, *(model_descriptions or ())]
        raise DataError(_unmatched(missing, len(data_class_names), known, tiers))
    if len(np.unique(matched)) < len(matched):
        values, counts = np.unique(matched, return_counts=True)
        target = int(values[counts > 1][0])
        names = [data_class_names[int(index)] for index in np.flatnonzero(matched == target)]
        raise DataError(
            f"each class of the data must be its own class of the model. Got {names} for "
            f"{model_class_names[target]!r}. Merge or rename them."
        )
    return matched


def imagenet_descriptions(names: Iterable[str]) -> tuple[str, ...] | None:
    """Return the words of each ImageNet folder name (n01443537), or None if one is unknown.

    Source: WordNet's lemmas, as timm lists them.
    """
    wnids = list(names)
    if not wnids or not all(re.fullmatch(r"n\d{8}", name) for name in wnids):
        return None
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")
    try:
        return tuple(info.label_name_to_description(name) for name in wnids)
    except KeyError:
        return None


def _tiers(names: Sequence[str], descriptions: Sequence[str] | None) -> list[dict[str, int]]:
    """Tables of name -> class index, the strictest first."""
    tiers: list[dict[str, int]] = [{}, {}, {}]
    for index, name in enumerate(names):
        _put(tiers[0], name, index)
        described = descriptions[index] if descriptions else ""
        if described:
            _put(tiers[1], described, index)
        for word in {*_words(described), *_words(name)}:
            _put(tiers[2], word, index)
    return tiers


def _put(table: dict[str, int], key: str, index: int) -> None:
    table[key] = index if table.get(key, index) == index else _AMBIGUOUS


def _words(text: str) -> list[str]:
    return [word for part in text.split(",") if (word := part.strip().replace("_", " "))]


def _find(name: str, tiers: list[dict[str, int]]) -> int:
    """The class of `name`, or -1."""
    for tier in tiers[:2]:
        if name in tier:
            return tier[name]
    plain = name.replace("_", " ")
    if plain in tiers[2]:
        return tiers[2][plain]
    described = imagenet_descriptions([name])
    if described is None:
        return -1
    if described[0] in tiers[0]:
        return tiers[0][described[0]]
    found = {tiers[2][word] for word in _words(described[0]) if tiers[2].get(word, -1) >= 0}
    return found.pop() if len(found) == 1 else -1


def _unmatched(
    missing: list[str], num_classes: int, known: list[str], tiers: list[dict[str, int]]
) -> str:
    listed = []
    for name in missing[:_MOST_LISTED]:
        plain = name.replace("_", " ")
        if _AMBIGUOUS in (tiers[0].get(name), tiers[1].get(name), tiers[2].get(plain)):
            listed.append(f"{name!r} means several of the model's classes.")
        else:
            listed.append(f"{name!r} is none of them.{suggestion(name, known)}")
    rest = len(missing) - _MOST_LISTED
    more = f" And {rest} more." if rest > 0 else ""
    return (
        f"every class of the data must be a class of the model, by name. Got {len(missing)} of "
        f"{num_classes} that are not. {' '.join(listed)}{more} Rename the data's classes."
    )

"""fieldmark: labelled images in, a verified and served classifier out.

    import fieldmark
    run = fieldmark.train("cifar10-resnet18", ["train.epochs=2"])
    fieldmark.export(run.path)

The verbs are those of the command line; see `fieldmark.pipeline`, `fieldmark.inspection`,
`fieldmark.tuning`, `fieldmark.calibration` and `fieldmark.sharing`.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "augment",
    "bench",
    "calibrate",
    "evaluate",
    "export",
    "info",
    "lr_find",
    "package",
    "predict",
    "pull",
    "push",
    "quantize",
    "quickstart",
    "recipes",
    "serve",
    "sweep",
    "train",
    "verify",
]

if TYPE_CHECKING:
    from fieldmark.calibration import calibrate
    from fieldmark.inspection import augment, bench, info, quickstart, recipes
    from fieldmark.pipeline import (
        evaluate,
        export,
        package,
        predict,
        quantize,
        serve,
        train,
        verify,
    )
    from fieldmark.sharing import pull, push
    from fieldmark.tuning import lr_find, sweep

_ROOMS = {
    "fieldmark.calibration": ("calibrate",),
    "fieldmark.sharing": ("pull", "push"),
    "fieldmark.inspection": ("augment", "bench", "info", "quickstart", "recipes"),
    "fieldmark.tuning": ("lr_find", "sweep"),
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        found = (room for room, names in _ROOMS.items() if name in names)
        room = next(found, "fieldmark.pipeline")
        return getattr(importlib.import_module(room), name)
    raise AttributeError(f"module 'fieldmark' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

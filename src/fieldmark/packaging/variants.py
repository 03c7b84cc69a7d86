"""Any variant of a package as a Predict: the one place that knows which library opens what.

It imports that library when it is asked for, so that the others need not be installed.
"""

from fieldmark.errors import UnknownName, require
from fieldmark.measure import Predict
from fieldmark.packaging.manifest import Package
from fieldmark.packaging.served import SERVED, open_served


def open_variant(package: Package, name: str, threads: int = 0) -> Predict:
    """Return any variant as a Predict on the CPU.

    Args:
        threads: of what needs no torch; 0 takes the cores this process may use.

    Raises:
        UnknownName: there is no such variant.
        MissingDependency: its library is not installed.
        PackageError: it cannot be opened, or does not fit.
        IntegrityError: a file is missing, truncated or altered.
    """
    variants = package.manifest.variants
    if name not in variants:
        raise UnknownName.among(f"variant of {package.path}", name, variants)
    kind = variants[name].kind
    if kind in SERVED:
        return open_served(package, name, threads)
    require("torch", "train", f"variant {name!r}")
    from fieldmark.packaging.torch_load import open_pt2, open_torchscript

    return (open_torchscript if kind == "torchscript" else open_pt2)(package, name)

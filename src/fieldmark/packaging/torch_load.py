"""Opening the variants of a package that need torch: TorchScript, and programs of torch.export."""

import io
import warnings
import zipfile
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fieldmark.errors import PackageError
from fieldmark.measure import Predict
from fieldmark.packaging.export_parts import quiet
from fieldmark.packaging.load import check_images
from fieldmark.packaging.manifest import Package


def open_torchscript(package: Package, variant: str = "torchscript") -> Predict:
    """Return a TorchScript variant as a Predict on the CPU.

    Opening TorchScript can run code that its file holds. The checksum says that the file is the
    one the package was given, not that its writer can be trusted.

    Raises:
        PackageError: there is no such variant, or torch cannot open it.
        IntegrityError: the file is missing, truncated or altered.
    """
    entry = package.variant(variant, "torchscript")
    data = package.read(entry.file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # said once, where it is exported
            module = torch.jit.load(io.BytesIO(data), map_location="cpu").eval()
    except (RuntimeError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:200]
        raise PackageError(
            f"{package.path / entry.file} must be TorchScript that torch {torch.__version__} can "
            f"open. {reason}."
        ) from error

    def run(images: Tensor) -> Tensor:
        # Optimising again for each new batch size takes up to a second, and gains nothing here.
        with torch.jit.optimized_execution(False):
            logits: Tensor = module(images)
        return logits

    return _predict(run, package)


def open_pt2(package: Package, variant: str = "pt2") -> Predict:
    """Return a program of torch.export as a Predict on the CPU.

    torch promises neither that another version opens it nor that a forged one is harmless; the
    checksum says that the file is the one the package was given.

    Raises:
        PackageError: there is no such variant, or torch cannot open it.
        IntegrityError: the file is missing, truncated or altered.
    """
    entry = package.variant(variant, "pt2")
    data = package.read(entry.file)
    try:
        with quiet():  # it logs a traceback before it raises
            module = torch.export.load(io.BytesIO(data)).module()
    # What a damaged or foreign file raises has no common base but Exception.
    except Exception as error:
        raise PackageError(
            f"{package.path / entry.file} must be a program that torch {torch.__version__} can "
            f"open. {entry.written_by or 'Another version'} wrote it, and torch does not promise "
            f"to read it in others. Run: fieldmark export {package.path} --to pt2."
        ) from error
    return _predict(module, package)


def _predict(run: Callable[[Tensor], Tensor], package: Package) -> Predict:
    spec = package.preprocess

    @torch.inference_mode()
    def predict(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        check_images(images, spec.height_px, spec.width_px)
        logits: npt.NDArray[np.float32] = run(torch.from_numpy(np.array(images))).numpy()
        return logits

    return predict

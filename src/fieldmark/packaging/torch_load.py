"""Opening a package's TorchScript variant, which needs torch."""

import io
import warnings
import zipfile

import numpy as np
import numpy.typing as npt
import torch

from fieldmark.errors import PackageError
from fieldmark.measure import Predict
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
    spec = package.preprocess
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

    @torch.inference_mode()
    def predict(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        check_images(images, spec.height_px, spec.width_px)
        # Optimising again for each new batch size takes up to a second, and gains nothing here.
        with torch.jit.optimized_execution(False):
            logits: npt.NDArray[np.float32] = module(torch.from_numpy(np.array(images))).numpy()
        return logits

    return predict

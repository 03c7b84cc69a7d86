"""The model and the preprocessing that both ONNX rivals use: those of the package."""

from pathlib import Path

from fieldmark.packaging.load import open_onnx
from fieldmark.packaging.manifest import open_package


class SameModel:
    """The package's ONNX variant with one thread, and its preprocessing."""

    def __init__(self, package_path: str) -> None:
        package = open_package(Path(package_path))
        self.predict = open_onnx(package, "onnx", threads=1)
        self.decode = package.preprocess
        self.class_names = package.class_names

    def best(self, logits) -> dict[str, str]:
        """Return the answer for a row of logits."""
        return {"class_name": self.class_names[int(logits.argmax())]}

"""Making probabilities mean what they say: the temperature of a package."""

from pathlib import Path

from fieldmark.errors import ConfigError, require
from fieldmark.pipeline import MAX_PARITY_IMAGES, Result, verify


def calibrate(
    model: str | Path,
    *,
    data: str = "",
    image_column: str = "",
    label_column: str = "",
    split: str = "auto",
    max_images: int = MAX_PARITY_IMAGES,
    plot: str | Path | None = None,
) -> Result:
    """Fit a temperature to a package's logits, record it, and check every variant with it.

    `predict` and `serve` divide logits by it; no ranking changes.

    Args:
        data: labelled images that were not trained on; default: the recorded validation split.
        split: which split of `data`; auto takes val, and never the test images of the source that
            the model was trained on.
        max_images: at most so many, chosen evenly over the split.
        plot: a PNG of the reliability diagram.
    """
    require("torch", "train", "calibrating confidence")
    from fieldmark.evaluation.confidence import calibrate_package
    from fieldmark.evaluation.reliability_plot import save_reliability_plot
    from fieldmark.packaging.manifest import package_folder

    if plot is not None and not Path(plot).absolute().parent.is_dir():
        raise ConfigError(f"--plot {plot} must be in a folder that exists. Make it first.")
    folder = package_folder(model)
    columns = {"image_column": image_column, "label_column": label_column}
    package, facts = calibrate_package(
        folder, data=data, columns=columns, split=split, max_images=max_images
    )
    if plot is not None and package.manifest.confidence is not None:
        title = f"{package.manifest.name}: {package.manifest.confidence.data}"
        save_reliability_plot(Path(plot), package.manifest.confidence, title=title)
        facts["plot"] = str(plot)
    if not package.manifest.variants:
        return Result(folder, facts | {"variants": {}})
    # Not the images of the fit where they chose an int8 variant: `verify` knows which to take.
    where = {"data": data, "split": facts["split"], **columns} if data else {}
    checked = verify(folder, max_images=max_images, **where)
    return Result(folder, facts | checked.facts, checked.passed)

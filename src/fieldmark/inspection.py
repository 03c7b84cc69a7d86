"""Looking at things: what a package, a run or a data source holds, how fast a package is here, and
the whole job in small.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fieldmark.errors import ConfigError, require
from fieldmark.pipeline import Result, export, predict, train

if TYPE_CHECKING:
    from fieldmark.measure import Predict
    from fieldmark.packaging.manifest import Package
    from fieldmark.serving.speed import Opener

ROUNDS = 9  # the fewest whose median has a 95 % interval without the best and the worst
SECONDS = 30.0
MAX_LATENCY_MS = 500.0


def recipes() -> list[dict[str, str]]:
    """Return name, summary, cost, result and evidence of every recipe."""
    from fieldmark.cookbook import describe_recipes

    return describe_recipes()


def info(
    target: str | Path,
    *,
    pie: str | Path | None = None,
    image_column: str = "",
    label_column: str = "",
) -> Result:
    """Describe a package, a run, or a data source (class counts for each split).

    Args:
        pie: a PNG of the class distribution, for a data source.
    """
    from fieldmark.evaluation.describe import describe

    columns = {"image_column": image_column, "label_column": label_column}
    return Result(None, describe(str(target), None if pie is None else Path(pie), columns))


def bench(
    model: str | Path,
    variants: Sequence[str] = (),
    *,
    batches: Sequence[int] = (),
    threads: Sequence[str] = (),
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    max_latency_ms: float = MAX_LATENCY_MS,
    seed: int = 0,
    out: str | Path | None = None,
    plot: str | Path | None = None,
) -> Result:
    """Time a package's variants on this machine, and keep the best for `serve` and `predict`.

    Args:
        variants: default: all of ONNX; those that OpenVINO or torch runs, and "torch" itself, when
            named.
        batches: images in a call; default 1 and 8.
        threads: "2", or "2x1" for two calls at once with a thread each; default one thread, all
            cores in one call, and as many calls as cores.
        seconds: of all timed turns together.
        max_latency_ms: a variant and setting whose 99th percentile is above are not preferred.
        seed: of the order of the turns.
        out: a JSON file of the facts.
        plot: a PNG of latency over throughput.
    """
    from fieldmark.packaging.manifest import open_package, package_folder
    from fieldmark.runtime.files import write_json
    from fieldmark.serving.bench import Asked
    from fieldmark.serving.bench import bench as time_package

    for option, path in (("--out", out), ("--plot", plot)):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"{option} {path} must be in a folder that exists. Make it first.")
    if plot is not None:
        require("matplotlib", "train", "drawing the benchmark")
    package = open_package(package_folder(model))
    asked = Asked(variants, batches, threads, rounds, seconds, max_latency_ms, seed)
    facts = time_package(package, asked, _opener(package, variants))
    if plot is not None:
        from fieldmark.evaluation.speed_plot import save_speed_plot

        save_speed_plot(Path(plot), facts)
        facts["plot"] = str(plot)
    if out is not None:
        write_json(Path(out), facts)
    return Result(None if out is None else Path(out), facts)


def preferred(model: str | Path) -> Result:
    """Return what `bench` recorded of a package on this machine; "record" is None without."""
    from fieldmark.packaging.manifest import open_package, package_folder
    from fieldmark.serving.bench import show_record
    from fieldmark.serving.preference import read_record

    package = open_package(package_folder(model))
    return Result(None, show_record(package, read_record(package)))


def augment(
    source: str,
    out: str | Path,
    settings: Sequence[str] = (),
    *,
    recipe: str = "",
    rows: int = 8,
) -> Result:
    """Draw what training would show the network of a source's images, as a PNG grid.

    Args:
        settings: "section.key=value" over the recipe, such as augment.policy=strong.
        recipe: whose settings to take; default: augment.policy=auto alone.
        rows: images shown, of as many classes.
    """
    require("torch", "train", "augmenting images")
    from fieldmark.training.preview import draw_preview, preview_config
    from fieldmark.training.start import resolve_pretrained

    config = preview_config(source, recipe, settings)
    pretrained = resolve_pretrained(config.model)
    return Result(Path(out), draw_preview(Path(out), config, pretrained, num_rows=rows))


def quickstart(out: str | Path | None = None) -> Result:
    """Run the whole job on handwritten digits: train, export, verify, predict one image."""
    require("torch", "train", "the quickstart")
    from fieldmark.packaging.manifest import package_folder
    from fieldmark.training.run_folder import default_folder

    run = train("digits", out=out or default_folder("quickstart"))
    exported = export(str(run.path))
    sample = next(iter(sorted((package_folder(str(run.path)) / "golden").glob("*.png"))))
    (answer,) = predict(str(run.path), [sample], top_k=3)
    facts = {**run.facts, "parity": exported.facts, "sample": answer.to_json()}
    return Result(run.path, facts, exported.passed)


def _opener(package: "Package", named: Sequence[str]) -> "Opener":
    """Return what opens a variant with so many threads: ONNX and OpenVINO without torch.

    Torch is imported now if one of the named needs it, so that no variant's memory counts it.
    """
    from fieldmark.packaging.served import SERVED, open_served

    known = package.manifest.variants
    of_torch = [name for name in named if name not in known or known[name].kind not in SERVED]
    if not of_torch:
        return partial(open_served, package)
    require("torch", "train", f"timing variant {of_torch[0]!r}")
    from fieldmark.evaluation.backends import open_backend, with_threads
    from fieldmark.packaging.resolve import resolve_model

    def open_any(variant: str, threads: int) -> "Predict":
        if variant in of_torch:
            return with_threads(open_backend(resolve_model(str(package.path)), variant), threads)
        return open_served(package, variant, threads)

    return open_any

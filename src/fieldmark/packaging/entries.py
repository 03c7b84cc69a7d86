"""The parts of a manifest: what is recorded of files, classes, variants and measurements.

Whether a variant may be deployed is computed from stored measurements each time it is asked for,
so that no file can claim it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

Precision = Literal["float32", "int8"]
VariantKind = Literal["onnx", "torchscript", "pt2", "openvino"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a variant of one precision must reach to be deployable."""

    min_top1_agreement: float
    max_relative_delta_logit: float  # on golden samples, times max(1, largest |logit|)
    max_accuracy_drop: float  # a fraction; a quantized variant has the one it was made for


# One entry for each precision, so that a coarser one brings its own bounds.
LIMITS: dict[Precision, Limits] = {
    # The same weights and arithmetic in another order of summation: float32 logits then differ
    # by about 1e-6 of their size, so 1e-3 is far from rounding and far from any real fault. Only
    # images whose two best classes nearly tie may change their answer: 2 of 2,000 pass.
    # So few changed answers bound the accuracy by themselves.
    "float32": Limits(
        min_top1_agreement=0.999, max_relative_delta_logit=1e-3, max_accuracy_drop=1.0
    ),
    # Rounded weights and activations. Accuracy is what counts, and answers that change from one
    # wrong class to another, or where two classes nearly tie, do not touch it.
    "int8": Limits(min_top1_agreement=0.9, max_relative_delta_logit=0.25, max_accuracy_drop=0.01),
}

# The most by which a variant's calibration error may certainly exceed the reference's, where the
# package promises calibrated probabilities. Agreement and accuracy see only which class comes
# first: a variant that scales all logits passes both, and this alone notices. Temperature scaling
# leaves errors of 0.01 to 0.03, so 0.02 more would undo it. With few images the error is mostly
# chance.
MAX_ECE_INCREASE = 0.02
MIN_ECE_IMAGES = 500


def _inside(name: str) -> str:
    """Return `name` if it is a plain relative path, with '/', that stays in its folder."""
    parts = name.split("/")
    if "\\" in name or "\0" in name or ":" in parts[0] or {"", ".", ".."} & set(parts):
        raise ValueError(
            f"a file must be named by a relative path inside the package. Got {name!r}"
        )
    return name


RelativePath = Annotated[str, AfterValidator(_inside)]


class Entry(BaseModel):
    """Base of every part of the manifest: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileEntry(Entry):
    """Size and checksum of one file."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class ArchitectureEntry(Entry):
    """What rebuilds the network, and whether plain timm can do it."""

    name: str
    num_classes: int = Field(gt=0)
    args: dict[str, JsonValue] = {}
    opens_in: Literal["timm", "fieldmark"]


class ClassEntry(Entry):
    """One class; its index in the manifest is the index of its logit."""

    name: str = Field(min_length=1)
    description: str = ""


class GoldenEntry(Entry):
    """Where the golden samples come from: real images, drawn ones, or there are none."""

    kind: Literal["data", "synthetic", "none"]
    count: int = Field(ge=0, le=1000)


class Measured(Entry):
    """A number, often a fraction, with its 95 % interval and the number of images."""

    value: float
    low: float
    high: float
    n: int = Field(gt=0)


class GoldenCheck(Entry):
    """What a model did with the golden samples, as measured."""

    num_samples: int = Field(ge=0)
    max_level_difference: int = Field(ge=0, le=255)  # of decoded pixels, 0 to 255
    allowed_level_difference: int = Field(ge=0)  # above 0 where Pillow's version differs
    max_abs_delta_logit: float | None  # None: not finite, or not the shape of the recorded logits
    tolerance: float = Field(ge=0)
    num_wrong_answers: int = Field(ge=0)  # the class name is not the recorded one
    instruction_set: str

    @property
    def passed(self) -> bool:
        """Whether there were samples and all of them gave what is recorded."""
        return not self.problems()

    def problems(self) -> list[str]:
        """Return a sentence for each thing that is not as recorded."""
        if not self.num_samples:
            return ["The package has no golden samples."]
        found = []
        if self.max_level_difference > self.allowed_level_difference:
            found.append(
                f"Golden images must decode to the recorded pixels (within "
                f"{self.allowed_level_difference} levels). Got a difference of "
                f"{self.max_level_difference}."
            )
        if self.max_abs_delta_logit is None:
            found.append("Golden logits must be finite and one per class. Got others.")
        elif self.max_abs_delta_logit > self.tolerance:
            found.append(
                f"Golden logits must be within {self.tolerance:.2g} of the recorded ones. "
                f"Got {self.max_abs_delta_logit:.2g}."
            )
        if self.num_wrong_answers:
            found.append(
                f"Golden samples must be given the recorded classes. "
                f"Got {self.num_wrong_answers} of {self.num_samples} wrong."
            )
        return found


class Parity(Entry):
    """How a variant compares with the eager model on real images."""

    top1_agreement: Measured
    max_abs_delta_logit: float | None  # None: not finite
    mean_abs_delta_logit: float | None  # None: not finite
    accuracy_drop: Measured  # accuracy of the eager model minus the variant's, paired
    data: str  # which images, in words
    instruction_set: str  # of the machine it was measured on
    images_sha256: str | None = None  # of their prepared pixels, in order; None: not noted then
    # None: measured before confidence was, or the variant's logits are not finite.
    reference_accuracy: Measured | None = None
    accuracy: Measured | None = None
    temperature: float | None = None  # of the package then; None: it had none, so 1
    reference_ece: Measured | None = None
    ece: Measured | None = None
    ece_increase: Measured | None = None  # the variant's minus the eager model's, paired
    reference_nll: Measured | None = None
    nll: Measured | None = None

    def problems(self, precision: Precision, max_drop: float | None = None) -> list[str]:
        """Return a sentence for each limit that is missed.

        Args:
            max_drop: of accuracy, a fraction; None: the limit of the precision.
        """
        found = []
        least = LIMITS[precision].min_top1_agreement
        rate = self.top1_agreement
        if rate.value < least:
            found.append(
                f"Top-1 agreement must be at least {least:.2%} for {precision}. "
                f"Got {rate.value:.2%} on {rate.n} images ({self.data})."
            )
        most = LIMITS[precision].max_accuracy_drop if max_drop is None else max_drop
        drop = self.accuracy_drop
        if drop.value > most:
            found.append(
                f"Accuracy must drop by at most {100 * most:g} points. Got {100 * drop.value:.2f} "
                f"({100 * drop.low:.2f} to {100 * drop.high:.2f}) on {drop.n} images "
                f"({self.data})."
            )
        drift = self.ece_increase if self.temperature is not None else None
        if drift and drift.n >= MIN_ECE_IMAGES and drift.low > MAX_ECE_INCREASE:
            found.append(
                f"Calibration error must not exceed the trained model's by more than "
                f"{MAX_ECE_INCREASE:g}. Got {drift.value:.3f} more (95 % interval {drift.low:.3f} "
                f"to {drift.high:.3f}) on {drift.n} images ({self.data})."
            )
        return found


class ReliabilityBin(Entry):
    """The images whose top probability is in (low, high]."""

    low: float
    high: float
    count: int = Field(ge=0)
    mean_confidence: float | None  # None: no images
    accuracy: Measured | None  # None: no images


class CalibrationEntry(Entry):
    """How well probabilities fit what happened, at one temperature."""

    nll: Measured  # in nats
    ece: Measured
    bins: tuple[ReliabilityBin, ...]


class Confidence(Entry):
    """What logits are divided by before softmax, and how it was found.

    `predict` and `serve` apply it. Exported models, golden samples and rankings do not know it.
    """

    temperature: float = Field(gt=0)
    low: float = Field(gt=0)  # of its 95 % interval
    high: float = Field(gt=0)
    data: str  # which images it was fitted on, in words
    num_images: int = Field(gt=0)
    fingerprint: str  # of the data source
    before: CalibrationEntry  # at temperature 1, on the same images
    after: CalibrationEntry
    nll_change: Measured  # after minus before, paired


class TensorEntry(Entry):
    """An input or output of a variant."""

    name: str
    dtype: Literal["uint8", "float32"]
    shape: tuple[int | str, ...]  # a name stands for a size that is free


class ImageSet(Entry):
    """Which images something was fitted to, or chosen by."""

    data: str  # in words
    num_images: int = Field(gt=0)
    seed: int  # of the choice
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")  # of the prepared pixels, in order


class Quantization(Entry):
    """How an int8 variant was made."""

    method: Literal["static", "dynamic"]
    calibration: Literal["minmax", "percentile", "entropy"] | None  # None: dynamic
    reduce_range: bool  # weights of 7 bits
    bias_corrected: bool
    num_layers: int = Field(ge=0)  # that hold weights
    layers_in_float: tuple[str, ...]
    max_drop: float  # of accuracy, a fraction: the bound it must hold to be deployable
    calibration_set: ImageSet | None  # None: dynamic
    selection_set: ImageSet | None  # None: nothing was chosen by looking at images
    num_tried: int = Field(ge=1)
    instruction_set: str  # of the machine it was made for


class GraphEntry(Entry):
    """What an exported graph consists of."""

    operators: dict[str, int]  # how many of each, the most frequent first
    num_parameters: int = Field(ge=0)  # values it stores: weights and constants, not shapes


class HeadEntry(Entry):
    """The linear layer over the mean of the features, by its tensors in model.safetensors."""

    weight: str  # (K, C)
    bias: str = ""  # (K,); empty: it has none


@dataclass(frozen=True, slots=True)
class Features:
    """The last feature map of a graph, and the layer that makes class maps of it."""

    shape: tuple[int, int, int]  # channels, height, width
    head: HeadEntry


class Variant(Entry):
    """An exported model and what was measured of it."""

    kind: VariantKind
    precision: Precision
    file: RelativePath
    weights_file: RelativePath | None = None  # of OpenVINO, whose graph and weights are two files
    opset: int | None = None  # of ONNX
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]  # logits, and perhaps features
    head: HeadEntry | None = None  # beside features: what makes class maps of them
    graph: GraphEntry | None = None
    written_by: str = ""  # the library and its version
    golden: GoldenCheck | None = None
    parity: Parity | None = None
    quantization: Quantization | None = None  # of int8

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.kind == "openvino") != (self.weights_file is not None):
            raise ValueError(
                f"weights_file must be set for openvino, and for nothing else. "
                f"Got {self.weights_file} for {self.kind}"
            )
        return self

    @property
    def files(self) -> tuple[str, ...]:
        """The files that it consists of."""
        return (self.file,) if self.weights_file is None else (self.file, self.weights_file)

    def made_by(self, package: Path) -> str:
        """Return the command that makes such a variant anew."""
        if self.quantization is not None:
            return f"fieldmark quantize {package} --method {self.quantization.method}"
        return f"fieldmark export {package} --to {self.kind}"

    @property
    def features(self) -> Features | None:
        """The last feature map, if it is an output."""
        if self.head is None or len(self.outputs) < 2:
            return None
        channels, height, width = (int(size) for size in self.outputs[1].shape[1:])
        return Features((channels, height, width), self.head)

    @property
    def deployable(self) -> bool:
        """Whether golden samples passed and parity on real images is within its limits."""
        return not self.obstacles()

    def obstacles(self) -> list[str]:
        """Return why the variant is not deployable, a sentence each."""
        found = ["Golden samples were not checked."] if self.golden is None else []
        if self.golden is not None:
            found += self.golden.problems()
        if self.parity is None:
            return [*found, "Parity was not measured on real images."]
        return found + self.parity_problems(self.parity)

    def parity_problems(self, parity: Parity) -> list[str]:
        """Return a sentence for each limit of this variant that a comparison misses."""
        quantization = self.quantization
        return parity.problems(
            self.precision, None if quantization is None else quantization.max_drop
        )

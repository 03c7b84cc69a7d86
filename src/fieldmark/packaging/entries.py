"""The parts of a manifest: what is recorded of files, classes, variants and measurements.

Whether a variant may be deployed is computed from stored measurements each time it is asked for,
so that no file can claim it.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

Precision = Literal["float32"]
VariantKind = Literal["onnx", "torchscript", "pt2", "openvino"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a variant of one precision must reach to be deployable."""

    min_top1_agreement: float
    max_relative_delta_logit: float  # on golden samples, times max(1, largest |logit|)


# One entry for each precision, so that a coarser one brings its own bounds.
LIMITS: dict[Precision, Limits] = {
    # The same weights and arithmetic in another order of summation: float32 logits then differ
    # by about 1e-6 of their size, so 1e-3 is far from rounding and far from any real fault. Only
    # images whose two best classes nearly tie may change their answer: 2 of 2,000 pass.
    "float32": Limits(min_top1_agreement=0.999, max_relative_delta_logit=1e-3),
}


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
    """A fraction with its 95 % interval and the number of images."""

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

    def problems(self, precision: Precision) -> list[str]:
        """Return a sentence for each limit that is missed."""
        least = LIMITS[precision].min_top1_agreement
        rate = self.top1_agreement
        if rate.value >= least:
            return []
        return [
            f"Top-1 agreement must be at least {least:.2%} for {precision}. "
            f"Got {rate.value:.2%} on {rate.n} images ({self.data})."
        ]


class TensorEntry(Entry):
    """An input or output of a variant."""

    name: str
    dtype: Literal["uint8", "float32"]
    shape: tuple[int | str, ...]  # a name stands for a size that is free


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
        return found + self.parity.problems(self.precision)

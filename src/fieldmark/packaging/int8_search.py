"""The smallest change that keeps an int8 model's accuracy: tried in order, until the bound holds.

First the ways to quantize that cost nothing (calibrations, each with and without corrected biases),
then layers left in float32, those first whose rounding alone moves the logits most, the fewest that
hold the bound. Images that this looks at must not be used to report the result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fieldmark.measure import Agreement
from fieldmark.packaging.int8 import CALIBRATIONS, Calibration, Int8Settings
from fieldmark.runtime.log import progress, say


@dataclass(frozen=True, slots=True)
class Measured:
    """An int8 model against the float32 one on the selection images."""

    agreement: Agreement
    mean_kl: float  # Kullback-Leibler divergence from the float32 answer, nats, mean over images
    drop: float  # of accuracy, a fraction: what the bound is for
    speed_ratio: float  # images per second over those of float32, in the same minute


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model that was tried."""

    settings: Int8Settings
    num_bytes: int
    measured: Measured

    def holds(self, max_drop: float) -> bool:
        """Return whether it may be taken: within the bound, and faster than float32."""
        return self.measured.drop <= max_drop and self.measured.speed_ratio > 1.0

    def to_json(self) -> dict[str, Any]:
        """Return plain values; the drop and the agreement are fractions."""
        return {
            "calibration": self.settings.calibration,
            "reduce_range": self.settings.reduce_range,
            "bias_corrected": self.settings.bias_corrected,
            "layers_in_float": len(self.settings.float_layers),
            "bytes": self.num_bytes,
            "speed_ratio": round(self.measured.speed_ratio, 3),
            "mean_kl": self.measured.mean_kl,
            "drop": self.measured.drop,
            **self.measured.agreement.to_json(),
        }


class Quantizer(Protocol):
    """What the search needs of `int8.StaticQuantizer`."""

    layers: tuple[str, ...]

    def quantized(self, settings: Int8Settings) -> bytes:
        """Return the int8 model."""

    def quantized_alone(self, layer: str, settings: Int8Settings) -> bytes:
        """Return the float32 model with one layer in int8."""


@dataclass(frozen=True, slots=True)
class Found:
    """What the search came to."""

    best: Candidate
    model: bytes
    holds: bool
    tried: tuple[Candidate, ...]  # in the order of trying
    sensitivity: dict[str, float]  # layer -> mean KL of rounding it alone; empty if not needed


class Int8Search:
    """Tries settings one after another; see the module."""

    def __init__(
        self,
        quantizer: Quantizer,
        measure: Callable[[bytes], Measured],
        mean_kl: Callable[[bytes], float],
        *,
        max_drop: float,
        reduce_range: bool,
    ) -> None:
        """Make a search.

        Args:
            measure: of a whole int8 model, on all selection images.
            mean_kl: of a model with one layer in int8; on fewer images, as it is asked so often.
            max_drop: of accuracy, a fraction.
        """
        self._quantizer, self._measure, self._mean_kl = quantizer, measure, mean_kl
        self._max_drop, self._reduce_range = max_drop, reduce_range
        self._tried: list[Candidate] = []
        self._models: dict[Int8Settings, tuple[Candidate, bytes]] = {}

    def run(self, calibrations: Sequence[Calibration] = CALIBRATIONS) -> Found:
        """Return the first settings that hold the bound, or the nearest of all tried."""
        tried: list[Candidate] = []
        for calibration in calibrations:
            plain = self._try(Int8Settings(calibration, self._reduce_range))
            corrected = self._try(replace(plain.settings, bias_corrected=True))
            holding = [one for one in (plain, corrected) if one.holds(self._max_drop)]
            if holding:
                return self._found(min(holding, key=_distance), {})
            tried += [plain, corrected]
        return self._with_float_layers(min(tried, key=_distance).settings)

    def _with_float_layers(self, settings: Int8Settings) -> Found:
        """Double the number of float layers until the bound holds, then halve the gap."""
        sensitivity = self._sensitivity(settings)
        ranked = sorted(sensitivity, key=lambda layer: -sensitivity[layer])
        fails, count = 0, 1
        holding: Candidate | None = None
        while holding is None and count <= max(1, len(ranked) // 2):
            tried = self._try(replace(settings, float_layers=tuple(ranked[:count])))
            if tried.holds(self._max_drop):
                holding = tried
            else:
                fails, count = count, count * 2
        while holding is not None and len(holding.settings.float_layers) - fails > 1:
            middle = (len(holding.settings.float_layers) + fails) // 2
            tried = self._try(replace(settings, float_layers=tuple(ranked[:middle])))
            if tried.holds(self._max_drop):
                holding = tried
            else:
                fails = middle
        return self._found(holding or min(self._tried, key=_distance), sensitivity)

    def _sensitivity(self, settings: Int8Settings) -> dict[str, float]:
        plain = replace(settings, bias_corrected=False)
        layers = self._quantizer.layers
        found = {}
        with progress("sensitivity", len(layers), "layers") as bar:
            for layer in layers:
                found[layer] = self._mean_kl(self._quantizer.quantized_alone(layer, plain))
                bar.advance(1)
        return found

    def _try(self, settings: Int8Settings) -> Candidate:
        model = self._quantizer.quantized(settings)
        candidate = Candidate(settings, len(model), self._measure(model))
        self._models[settings] = (candidate, model)
        self._tried.append(candidate)
        say(f"int8: {sentence(candidate)}")
        return candidate

    def _found(self, best: Candidate, sensitivity: dict[str, float]) -> Found:
        return Found(
            best=best,
            model=self._models[best.settings][1],
            holds=best.holds(self._max_drop),
            tried=tuple(self._tried),
            sensitivity=sensitivity,
        )


def sentence(candidate: Candidate) -> str:
    """Return one line on a candidate."""
    settings, measured = candidate.settings, candidate.measured
    parts = [
        settings.calibration,
        "7-bit weights" if settings.reduce_range else "8-bit weights",
        *(["corrected biases"] if settings.bias_corrected else []),
        *([f"{len(settings.float_layers)} layers in float"] if settings.float_layers else []),
    ]
    return (
        f"{', '.join(parts)}: agrees on {measured.agreement.top1_agreement.value:.2%} of "
        f"{measured.agreement.top1_agreement.n} images, accuracy drop {measured.drop:.2%}, "
        f"{measured.speed_ratio:.2f} times the speed of float32"
    )


def _distance(candidate: Candidate) -> tuple[bool, float]:
    """Slower than float32 is worse than anything; then the divergence, which is never a tie."""
    return candidate.measured.speed_ratio <= 1.0, candidate.measured.mean_kl

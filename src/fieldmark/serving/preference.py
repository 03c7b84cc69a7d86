"""What was found fastest on this machine: a record in the user's cache, beside no package.

A package holds what is true everywhere; speed is true of one machine. So the variant and threads
to serve with are kept in $XDG_CACHE_HOME/fieldmark/speed (or ~/.cache), under a name made of the
processor, its instruction set, the cores and the weights. Torch-free.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError

from fieldmark.measure import is_faster, p99
from fieldmark.packaging.entries import Entry
from fieldmark.packaging.manifest import WEIGHTS, Package
from fieldmark.packaging.served import SERVED, can_open
from fieldmark.runtime.cpu import cpu_name, instruction_set, num_cores
from fieldmark.runtime.files import sha256_bytes, write_json
from fieldmark.runtime.log import warn
from fieldmark.serving.speed import Candidate, Timing
from fieldmark.serving.workers import Setting, default_setting

DEFAULT_VARIANT = "onnx"


class Machine(Entry):
    """What speed depends on."""

    cpu: str
    instruction_set: str
    cores: int = Field(gt=0)


class Choice(Entry):
    """The variant to serve, how, and what was measured of it."""

    variant: str
    file_sha256: str
    workers: int = Field(gt=0)  # calls at once
    threads: int = Field(gt=0)  # within each
    batch: int = Field(gt=0)
    images_per_s: float = Field(gt=0)
    median_ms: float = Field(gt=0)


class Preference(Entry):
    """The content of a record."""

    format_version: Literal[1] = 1
    machine: Machine
    package: str  # its name, for people
    weights_sha256: str
    choice: Choice | None  # None: no variant was deployable
    why: str
    measured: tuple[str, ...]  # the variants that were compared
    measured_at: str  # ISO 8601, UTC
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Served:
    """What to open, and why."""

    variant: str
    setting: Setting
    why: str


def this_machine() -> Machine:
    """Return the facts of this machine that its records are kept under."""
    return Machine(cpu=cpu_name(), instruction_set=instruction_set(), cores=num_cores())


def record_path(package: Package) -> Path:
    """Return where this machine's record of a package is, or would be."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # A relative one is to be ignored, says the XDG specification.
    root = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    key = [this_machine().model_dump(), _weights(package)]
    name = sha256_bytes(json.dumps(key, sort_keys=True).encode())[:32]
    return root / "fieldmark" / "speed" / f"{name}.json"


def read_record(package: Package) -> Preference | None:
    """Return this machine's record of a package; one that cannot be used is ignored with a note."""
    try:
        path = record_path(package)
        found = Preference.model_validate_json(path.read_bytes(), strict=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, RuntimeError, ValidationError) as error:  # RuntimeError: there is no home
        fault = "it is damaged" if isinstance(error, ValidationError) else str(error)
        warn(f"the speed record of {package.path} was ignored: {fault}. Run: {_remedy(package)}.")
        return None
    if found.machine != this_machine() or found.weights_sha256 != _weights(package):
        warn(f"{path} was ignored: it is of another machine or package. Run: {_remedy(package)}.")
        return None
    return found


def write_record(package: Package, preference: Preference) -> Path | None:
    """Write the record, atomically; where that is not possible, say so and return None."""
    try:
        path = record_path(package)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, preference.model_dump())
    except (OSError, RuntimeError) as error:
        warn(f"the preferred variant could not be kept for the next `fieldmark serve`. {error}.")
        return None
    return path


def preferred(package: Package) -> Preference | None:
    """Return the record if it has a choice that the package still has, unchanged and deployable."""
    found = read_record(package)
    if found is None or found.choice is None:
        return None
    variant = package.manifest.variants.get(found.choice.variant)
    if variant is None or not variant.deployable or not can_open(variant.kind):
        return None
    if package.manifest.files[variant.file].sha256 != found.choice.file_sha256:
        return None  # exported anew since
    return found


def choose_served(
    package: Package, variant: str = "auto", setting: Setting | None = None
) -> Served:
    """Return what to serve: what was asked for, else what this machine prefers, else "onnx".

    Args:
        variant: auto, or the name of a variant, which is not looked up.
        setting: None: what was measured to suit the variant, else `default_setting`; of OpenVINO,
            where each call has a copy of the model, one call on all cores.
    """
    found = preferred(package)
    choice = None if found is None else found.choice
    if variant == "auto":
        name = DEFAULT_VARIANT if choice is None else choice.variant
        why = f"not measured here: {_remedy(package)}" if found is None else _said(found, package)
    else:
        name, why = variant, "as asked"
    if setting is not None:
        return Served(name, setting, why)
    if choice is None or choice.variant != name:
        entry = package.manifest.variants.get(name)
        is_copied = entry is not None and entry.kind == "openvino"
        cores = num_cores()
        return Served(name, Setting(1, cores) if is_copied else default_setting(cores), why)
    return Served(name, Setting(choice.workers, choice.threads), why)


def usable_names(package: Package) -> set[str]:
    """Return the variants that may be served, and can be."""
    variants = package.manifest.variants.items()
    return {name for name, entry in variants if entry.deployable and can_open(entry.kind)}


def choose(
    timings: Sequence[Timing], candidates: Mapping[str, Candidate], max_latency_ms: float
) -> tuple[Timing | None, str]:
    """Return the timing whose variant and setting to prefer, and why.

    That is the highest throughput among deployable variants whose calls are quick enough. What is
    not slower beyond the noise of the rounds ties with it, and of ties float32 goes first, then
    fewer calls at once, then the lower latency.

    Args:
        max_latency_ms: of the 99th percentile, or of the slowest call where there are too few.
    """
    usable = [timing for timing in timings if _is_usable(candidates[timing.combo.variant])]
    if not usable:
        return None, "no variant that was measured is deployable and can be served"
    quick = [timing for timing in usable if slow_ms(timing) <= max_latency_ms]
    if not quick:
        best = min(usable, key=slow_ms)
        return best, f"none answers within {max_latency_ms:g} ms, and this one comes nearest"
    top = max(quick, key=lambda timing: float(np.median(timing.images_per_s)))
    tied = [one for one in quick if one is top or not is_faster(top.images_per_s, one.images_per_s)]
    best = min(tied, key=lambda timing: _order(timing, candidates))
    limit = f"deployable and within {max_latency_ms:g} ms"
    if best is top:
        return best, f"the most images/s of what is {limit}"
    return best, f"as fast as any that is {limit}, within the noise of this measurement"


def slow_ms(timing: Timing) -> float:
    """Return how long a slow call takes: the 99th percentile, or of few calls the slowest."""
    found = p99(timing.latencies_ms)
    return float(timing.latencies_ms.max()) if found is None else found.value


def to_choice(timing: Timing, candidate: Candidate) -> Choice:
    """Return a timing as the choice that is recorded."""
    return Choice(
        variant=candidate.name,
        file_sha256=candidate.sha256,
        workers=timing.combo.setting.workers,
        threads=timing.combo.setting.threads,
        batch=timing.combo.batch,
        images_per_s=float(np.median(timing.images_per_s)),
        median_ms=float(np.median(timing.latencies_ms)),
    )


def _is_usable(candidate: Candidate) -> bool:
    return candidate.deployable and candidate.kind in SERVED


def _order(timing: Timing, candidates: Mapping[str, Candidate]) -> tuple[bool, int, float]:
    is_coarse = candidates[timing.combo.variant].precision != "float32"
    return is_coarse, timing.combo.setting.workers, float(np.median(timing.latencies_ms))


def _weights(package: Package) -> str:
    return package.manifest.files[WEIGHTS].sha256


def _remedy(package: Package) -> str:
    return f"fieldmark bench {package.path}"


def _said(found: Preference, package: Package) -> str:
    rate = found.choice.images_per_s if found.choice else 0.0
    why = f"preferred on this machine: {rate:.1f} images/s on {found.measured_at[:10]}"
    new = ", ".join(sorted(usable_names(package) - set(found.measured)))
    return f"{why}; {new} came since: {_remedy(package)}" if new else why

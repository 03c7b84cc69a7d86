"""The verb `bench`: what is timed, the facts of it, and the machine's record. Torch-free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from fieldmark.errors import ConfigError, PackageError, UnknownName
from fieldmark.measure import median_ratio, p99, quantile
from fieldmark.packaging.golden import check_golden
from fieldmark.packaging.manifest import WEIGHTS, Package
from fieldmark.packaging.served import can_open
from fieldmark.runtime.cpu import num_cores
from fieldmark.runtime.log import warn
from fieldmark.serving.preference import (
    Preference,
    choose,
    record_path,
    this_machine,
    to_choice,
    usable_names,
    write_record,
)
from fieldmark.serving.speed import (
    REFERENCE,
    Candidate,
    Memory,
    Opener,
    Plan,
    Timing,
    candidate,
    time_variants,
)
from fieldmark.serving.workers import default_settings, parse_setting

DEFAULT_BATCHES = (1, 8)
_LIBRARIES = ("fieldmark", "onnxruntime", "numpy", "torch", "openvino")


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user asked for; an empty list takes the default."""

    variants: Sequence[str]
    batches: Sequence[int]
    threads: Sequence[str]
    rounds: int
    seconds: float
    max_latency_ms: float
    seed: int


def make_plan(package: Package, asked: Asked) -> Plan:
    """Return what will be timed.

    Raises:
        ConfigError, UnknownName: it cannot be.
        PackageError: the package has no ONNX variant, and no other was asked for.
    """
    known = package.manifest.variants
    names = asked.variants or [name for name, entry in known.items() if can_open(entry.kind)]
    if not names:
        raise PackageError(
            f"{package.path} must have an ONNX variant to time. It has none. "
            f"Run: fieldmark export {package.path}, or ask for --variant {REFERENCE}."
        )
    for name in names:
        if name not in (REFERENCE, *known):
            raise UnknownName.among(f"variant of {package.path}", name, [REFERENCE, *known])
    batches = asked.batches or DEFAULT_BATCHES
    for what, value, least in (
        ("batch", min(batches), 1),
        ("rounds", asked.rounds, 1),
        ("seed", asked.seed, 0),
    ):
        if value < least:
            raise ConfigError(f"{what} must be at least {least}. Got {value}.")
    for what, seconds in (("seconds", asked.seconds), ("max_latency_ms", asked.max_latency_ms)):
        if not 0 < seconds < float("inf"):
            raise ConfigError(f"{what} must be above 0. Got {seconds:g}.")
    cores = num_cores()
    settings = [parse_setting(text, cores) for text in asked.threads] or default_settings(cores)
    return Plan(
        tuple(dict.fromkeys(names)),
        tuple(dict.fromkeys(batches)),
        tuple(dict.fromkeys(settings)),
        asked.rounds,
        asked.seconds,
        asked.seed,
    )


def _checked(package: Package, item: Candidate, opener: Opener) -> Candidate:
    """Return the candidate, with what its golden samples say on this machine."""
    if not item.deployable or not package.manifest.golden.count:
        return item
    entry = package.manifest.variants[item.name]
    found = check_golden(package, opener(item.name, 1), entry.precision, recorded=entry.golden)
    return replace(item, obstacles=(*item.obstacles, *found.problems()))


def bench(package: Package, asked: Asked, opener: Opener) -> dict[str, Any]:
    """Time the variants, keep the preferred one in the machine's cache, and return the facts."""
    plan = make_plan(package, asked)
    listed = [_checked(package, candidate(package, name), opener) for name in plan.variants]
    candidates = {item.name: item for item in listed}
    timings, memory = time_variants(plan, package, listed, opener)
    preference = _preference(package, timings, candidates, asked.max_latency_ms)
    missing = sorted(usable_names(package) - candidates.keys())
    path = None
    if missing:
        warn(
            f"nothing was recorded as preferred: {', '.join(missing)} may be served too and was "
            "not measured."
        )
    else:
        path = write_record(package, preference)
    return {
        "package": str(package.path),
        "package_id": package.id,
        "measured_at": preference.measured_at,
        "machine": preference.machine.model_dump(),
        "versions": preference.versions,
        "plan": {
            "batches": list(plan.batches),
            "settings": [str(setting) for setting in plan.settings],
            "rounds": plan.rounds,
            "seconds": plan.seconds,
            "seed": plan.seed,
            "max_latency_ms": asked.max_latency_ms,
        },
        "variants": [_variant_facts(item, memory) for item in listed],
        "rows": _rows(timings, plan.variants[0]),
        "preferred": None if preference.choice is None else preference.choice.model_dump(),
        "why": preference.why,
        "record": None if path is None else str(path),
        "not_measured": missing,
    }


def show_record(package: Package, found: Preference | None) -> dict[str, Any]:
    """Return the facts of this machine's record, or that there is none."""
    facts: dict[str, Any] = {"package": str(package.path), "record": None}
    if found is None:
        return facts | {"machine": this_machine().model_dump()}
    facts |= found.model_dump(exclude={"package", "choice"})
    choice = None if found.choice is None else found.choice.model_dump()
    return facts | {"record": str(record_path(package)), "preferred": choice}


def _preference(
    package: Package,
    timings: Sequence[Timing],
    candidates: Mapping[str, Candidate],
    max_latency_ms: float,
) -> Preference:
    best, why = choose(timings, candidates, max_latency_ms)
    return Preference(
        machine=this_machine(),
        package=package.manifest.name,
        weights_sha256=package.manifest.files[WEIGHTS].sha256,
        choice=None if best is None else to_choice(best, candidates[best.combo.variant]),
        why=why,
        measured=tuple(candidates),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=_versions(),
    )


def _variant_facts(item: Candidate, memory: Sequence[Memory]) -> dict[str, Any]:
    return {
        "variant": item.name,
        "kind": item.kind,
        "precision": item.precision,
        "bytes": item.num_bytes,
        "deployable": item.deployable,
        "obstacles": list(item.obstacles),
        "memory_bytes": {
            str(one.setting): one.num_bytes for one in memory if one.variant == item.name
        },
    }


def _rows(timings: Sequence[Timing], first: str) -> list[dict[str, Any]]:
    """Return a row for each combination; its ratio is to `first`, all else equal."""
    firsts = {
        (one.combo.batch, one.combo.setting): one for one in timings if one.combo.variant == first
    }
    rows = []
    for one in timings:
        combo, rates = one.combo, one.images_per_s
        slowest = p99(one.latencies_ms)
        base = firsts[combo.batch, combo.setting]
        rows.append(
            {
                "variant": combo.variant,
                "batch": combo.batch,
                "workers": combo.setting.workers,
                "threads": combo.setting.threads,
                "p50_ms": quantile(one.latencies_ms, 0.5).to_json(),
                "p99_ms": None if slowest is None else slowest.to_json(),
                "images_per_s": {
                    "median": float(np.median(rates)),
                    "min": float(rates.min()),
                    "max": float(rates.max()),
                    "n": len(rates),
                },
                "ratio": None
                if combo.variant == first
                else median_ratio(rates, base.images_per_s).to_json(),
            }
        )
    return rows


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

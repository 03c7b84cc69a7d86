"""The model card: a package's manifest in words, as the README.md that hubs show. Torch-free.

Names and licences are what somebody typed. In the head they are JSON strings, which YAML reads as
such; below they are escaped, so that no class name becomes a heading, a link or a column.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fieldmark import __version__
from fieldmark.packaging.entries import Confidence, Measured, Variant
from fieldmark.packaging.manifest import Manifest
from fieldmark.runtime.files import size_text

MAX_CLASSES = 100
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~!$&])")
_MARK = "<!-- made by fieldmark; edit above and it is kept: "
# The hub takes these words as licences; any other is told by its name.
_LICENSE_WORDS = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m afl-3.0 artistic-2.0 "
    "bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 "
    "cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 "
    "cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 "
    "epl-1.0 epl-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 "
    "isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense "
    "zlib pddl llama2 llama3 gemma unknown other"
)
_HUB_LICENSES = frozenset(_LICENSE_WORDS.split())


def write_card(manifest: Manifest, package_id: str, source: str) -> bytes:
    """Return the model card of a package.

    Args:
        source: the address to pull it from.
    """
    sections = [
        _head(manifest),
        f"# {_text(manifest.name)}",
        _summary(manifest, package_id),
        _use(manifest, package_id, source),
        _accuracy(manifest.metrics),
        _confidence(manifest.confidence),
        _variants(manifest),
        _classes([entry.name for entry in manifest.classes]),
        _images(manifest),
        _origin(manifest),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}\n{_MARK}{digest[:16]} -->\n".encode()


def is_generated(card: bytes) -> bool:
    """Whether a model card is as `write_card` made it, of any package, and nobody edited it."""
    text, mark, end = card.decode(errors="replace").rpartition(f"\n{_MARK}")
    digest = hashlib.sha256(text.encode()).hexdigest()
    return bool(mark) and end.strip() == f"{digest[:16]} -->"


def _head(manifest: Manifest) -> str:
    license = _line(manifest.license)
    known = license.lower() in _HUB_LICENSES
    lines = []
    if license:
        lines.append(f"license: {_yaml(license.lower() if known else 'other')}")
    if license and not known:
        slug = re.sub(r"[^a-z0-9.]+", "-", license.lower()).strip("-.") or "other"
        lines.append(f"license_name: {_yaml(slug[:96])}")
    lines += [
        "library_name: fieldmark",
        "pipeline_tag: image-classification",
        "tags:",
        "- image-classification",
        *(f"- {kind}" for kind in sorted({v.kind for v in manifest.variants.values()})),
        "metrics:",
        "- accuracy",
    ]
    return "\n".join(["---", *lines, "---"])


def _summary(manifest: Manifest, package_id: str) -> str:
    spec, architecture = manifest.preprocess, manifest.architecture
    return (
        f"An image classifier: {architecture.num_classes} classes, {_text(architecture.name)}, "
        f"{spec.width_px} x {spec.height_px} px. A package of fieldmark "
        f"{_text(manifest.fieldmark_version)}; its id, the digest of all that is in it, is\n"
        f"`{package_id}`."
    )


def _use(manifest: Manifest, package_id: str, source: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", manifest.name).strip("-.") or "model"
    lines = [
        "## Use",
        "",
        "```sh",
        "pip install 'fieldmark[hub]'",
        f"fieldmark pull {_line(source)} --out {name} \\",
        f"    --expect {package_id}",
        f"fieldmark predict {name} photo.jpg",
        f"fieldmark serve {name}",
        "```",
        "",
        "From Python, with timm:",
        "",
        "```python",
        "import timm",
    ]
    if manifest.architecture.opens_in == "fieldmark":
        lines.append("import fieldmark.model  # registers the architecture")
    call = f'model = timm.create_model("local-dir:{name}", pretrained=True).eval()'
    return "\n".join([*lines, "", call, "```"])


def _accuracy(metrics: Mapping[str, Any]) -> str:
    rows = []
    for split, measured in metrics.items():
        if not isinstance(measured, Mapping):
            continue
        top1, top5 = _rate(measured.get("top1_accuracy")), _rate(measured.get("top5_accuracy"))
        if top1 is not None:
            data = measured.get("data", "")
            n = measured["top1_accuracy"]["n"]
            rows.append([split, top1, top5 or "", n, data if isinstance(data, str) else ""])
    if not rows:
        return "## Accuracy\n\nNot measured."
    columns = ["Split", "Top-1, 95 % interval", "Top-5, 95 % interval", "Images", "Data"]
    if not any(row[2] for row in rows):  # of few classes top-5 says nothing
        columns, *rows = ([*row[:2], *row[3:]] for row in [columns, *rows])
    return "## Accuracy\n\n" + _table(columns, rows)


def _confidence(confidence: Confidence | None) -> str:
    if confidence is None:
        return ""
    before, after = confidence.before, confidence.after
    rows = [
        ["Calibration error (ECE)", _plain(before.ece), _plain(after.ece)],
        ["Loss (NLL), nats", _plain(before.nll), _plain(after.nll)],
    ]
    words = (
        f"Probabilities are calibrated: logits are divided by {confidence.temperature:.4g}, fitted "
        f"on {confidence.data}."
    )
    columns = ["", "At temperature 1", "As served"]
    return f"## Confidence\n\n{_text(words)}\n\n" + _table(columns, rows)


def _plain(measured: Measured) -> str:
    return f"{measured.value:.4f} ({measured.low:.4f} to {measured.high:.4f})"


def _variants(manifest: Manifest) -> str:
    if not manifest.variants:
        return "## Variants\n\nNone: the weights alone. `fieldmark export` adds one."
    columns = ["Variant", "Precision", "Size", "Agreement", "Accuracy drop", "On", "Deployable"]
    rows = [
        [
            name,
            variant.precision,
            size_text(manifest.num_bytes(variant)),
            *_parity(variant),
        ]
        for name, variant in manifest.variants.items()
    ]
    words = (
        "Compared with the trained model on the same images: how often the best class is the same, "
        "and what accuracy is lost, with 95 % intervals."
    )
    return f"## Variants\n\n{words}\n\n" + _table(columns, rows)


def _parity(variant: Variant) -> list[str]:
    parity, yes = variant.parity, "yes" if variant.deployable else "no"
    if parity is None:
        return ["not measured", "not measured", "", yes]
    return [_interval(parity.top1_agreement), _interval(parity.accuracy_drop), parity.data, yes]


def _classes(names: Sequence[str]) -> str:
    listed = ", ".join(_text(name) for name in names[:MAX_CLASSES])
    more = len(names) - MAX_CLASSES
    end = f" and {more} more: see manifest.json." if more > 0 else "."
    return f"## Classes\n\nIn the order of the outputs: {listed}{end}"


def _images(manifest: Manifest) -> str:
    spec = manifest.preprocess.model_dump(mode="json")
    rows = [[name.replace("_", " "), json.dumps(value)] for name, value in spec.items()]
    return (
        "## How an image is prepared\n\nExported variants take uint8 pixels and normalise them "
        "themselves.\n\n" + _table(["", "Value"], rows)
    )


def _origin(manifest: Manifest) -> str:
    training = manifest.training or {}
    lines = ["## Origin", ""]
    if manifest.source:
        lines.append(f"- Weights: {_text(manifest.source)}")
    for key, words in (("recipe", "Recipe"), ("source", "Trained on"), ("steps", "Updates")):
        if training.get(key):
            lines.append(f"- {words}: {_text(training[key])}")
    golden = manifest.golden
    kinds = {"data": "real images", "synthetic": "drawn images", "none": "none"}
    count = f"{golden.count} " if golden.count else ""
    lines.append(f"- Golden samples: {count}{kinds[golden.kind]}")
    lines.append(f"- Licence: {_text(manifest.license) or 'not stated'}")
    return "\n".join([*lines, f"- Card written by fieldmark {__version__}"])


def _rate(value: Any) -> str | None:
    """Return a measured fraction as text, or None: it is none."""
    if not isinstance(value, Mapping):
        return None
    numbers = [value.get(name) for name in ("value", "low", "high", "n")]
    if not all(isinstance(number, int | float) for number in numbers):
        return None
    return f"{numbers[0]:.2%} ({numbers[1]:.2%} to {numbers[2]:.2%})"


def _interval(rate: Measured) -> str:
    return f"{rate.value:.2%} ({rate.low:.2%} to {rate.high:.2%})"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: Any) -> str:
    """Return one line of Markdown that shows `value` as it is."""
    return _MARKUP.sub(r"\\\1", _line(value))


def _line(value: Any) -> str:
    """Return `value` in one line, without what cannot be seen."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def _yaml(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)

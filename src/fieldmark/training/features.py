"""Features of a frozen network, extracted once and kept in the run's folder.

Features are what the classifier head reads: pooled, in float32, from pixels prepared as in serving.
They are written in parts, each file whole or absent, so that a run that was killed goes on with
the part it was in. A part says what it was made from; one made from anything else is made again.
"""

import hashlib
import io
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fieldmark.data.images import prepare
from fieldmark.data.labelled import Labels, Split
from fieldmark.data.parallel import ordered_map
from fieldmark.errors import ImageError, ModelError
from fieldmark.measure import Predict
from fieldmark.model import InferenceModule, eager_predict, head_parameters
from fieldmark.preprocess import Pixels, Preprocess
from fieldmark.runtime.files import write_atomic
from fieldmark.runtime.log import Bar, progress
from fieldmark.runtime.seed import derive_seed

PART_IMAGES = 1_024  # a kill loses the work on at most so many

OnBroken = Callable[[str, str], None]
"""name, reason -> returns to leave the image out, or raises."""


class FeatureNetwork(nn.Module):
    """A network without its head: normalised images (B, 3, H, W) -> features (B, D)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return what the head would read."""
        maps = self.network.forward_features(x_BCHW)  # type: ignore[operator]
        features: Tensor = self.network.forward_head(maps, pre_logits=True)  # type: ignore[operator]
        return features


@dataclass(frozen=True, slots=True)
class Features:
    """The features of a split's whole images, in its order."""

    values: npt.NDArray[np.float32]  # (V, N, D): V views of each image, the first as it is served
    labels: Labels  # (N,)
    seconds: float  # of extraction, over all processes that took part

    def __len__(self) -> int:
        return len(self.labels)


def linear_head(network: nn.Module, image_px: int) -> nn.Linear:
    """Return the head, which must be all that is between the features and the logits.

    Raises:
        ModelError: the head is no single linear layer with a bias, or the logits are not its
            output, as in airnet, which scales them.
    """
    head = network.get_classifier()  # type: ignore[operator]
    kind = type(network).__name__
    if not isinstance(head, nn.Linear) or head.bias is None:
        found = "one without a bias" if isinstance(head, nn.Linear) else type(head).__name__
        raise ModelError(
            f"the head of a network for train.method=linear-probe must be a linear layer with a "
            f"bias. {kind} has {found}. Choose another network, or train it by gradient."
        )
    rng = torch.Generator().manual_seed(derive_seed("linear head"))
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=rng))
        x_BCHW = torch.randn(2, 3, image_px, image_px, generator=rng)
        network.eval()
        try:
            logits, expected = network(x_BCHW), head(FeatureNetwork(network)(x_BCHW))
        except (AttributeError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ModelError(f"{kind} must give the features its head reads. {reason}.") from error
    if logits.shape != expected.shape or not torch.allclose(logits, expected, 1e-3, 1e-3):
        raise ModelError(
            f"the logits of a network for train.method=linear-probe must be the output of its "
            f"linear head. {kind} changes them afterwards. Choose another network."
        )
    return head


def frozen_digest(network: nn.Module) -> str:
    """Return the SHA-256, hex, of all weights and buffers but the head's."""
    head = {id(parameter) for parameter in head_parameters(network)}
    new = {name for name, parameter in network.named_parameters() if id(parameter) in head}
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if name not in new:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def feature_predict(
    network: nn.Module, preprocess: Preprocess, device: torch.device, *, channels_last: bool
) -> Predict:
    """Return uint8 images (B, H, W, 3) -> features (B, D), with the arithmetic of serving."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = network.to(memory_format=layout)
    module = InferenceModule(FeatureNetwork(network), preprocess.mean, preprocess.std)
    return eager_predict(module, device)


def extract(
    split: Split,
    preprocess: Preprocess,
    predict: Predict,
    *,
    folder: Path,
    key: Mapping[str, Any],
    mirrored: bool,
    batch_size: int,
    on_broken: OnBroken,
) -> Features:
    """Return a split's features, from the parts in `folder` as far as they are there.

    Args:
        key: all that the features depend on beside split, views and batch size; plain values.
        mirrored: a second view of each image, its mirror image.
        on_broken: called for each image that does not decode, in order; known ones included.
    """
    folder.mkdir(exist_ok=True)
    values, labels, seconds = [], [], 0.0
    with progress(f"features of {split.name}", len(split), "images") as bar:
        for start in range(0, len(split), PART_IMAGES):
            end = min(start + PART_IMAGES, len(split))
            path = folder / f"{split.name}-{start:08d}.npz"
            made_from = {
                **key,
                "split": split.name,
                "images": [start, end, len(split)],
                "mirrored": mirrored,
                "batch_size": batch_size,
            }
            stamp = json.dumps(made_from, sort_keys=True)
            part = _load(path, stamp)
            if part is None:
                part = _extract_part(
                    split, range(start, end), preprocess, predict, mirrored, batch_size, bar
                )
                _save(path, stamp, part)
            else:
                bar.start(end)  # what was there before does not count in the rate
            for name, reason in part.broken:
                on_broken(name, reason)
            values.append(part.values)
            labels.append(split.labels[part.rows])
            seconds += part.seconds
    return Features(np.concatenate(values, axis=1), np.concatenate(labels), seconds)


@dataclass(frozen=True, slots=True)
class _Part:
    values: npt.NDArray[np.float32]  # (V, n, D)
    rows: npt.NDArray[np.int64]  # (n,), positions in the split
    broken: list[tuple[str, str]]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Block:
    pixels: Pixels  # (n, H, W, 3)
    rows: list[int]
    broken: list[tuple[str, str]]
    size: int  # images, whole or not


def _extract_part(
    split: Split,
    indices: range,
    preprocess: Preprocess,
    predict: Predict,
    mirrored: bool,
    batch_size: int,
    bar: Bar,
) -> _Part:
    started = time.monotonic()
    views: list[list[npt.NDArray[np.float32]]] = [[] for _ in range(2 if mirrored else 1)]
    rows: list[int] = []
    broken: list[tuple[str, str]] = []
    for block in _read(split, indices, preprocess, batch_size):
        rows += block.rows
        broken += block.broken
        if block.rows:
            views[0].append(predict(block.pixels))
            if mirrored:
                views[1].append(predict(np.ascontiguousarray(block.pixels[:, :, ::-1])))
        bar.advance(block.size)
    if rows:
        values = np.stack([np.concatenate(view) for view in views])
    else:  # every image of the part is broken
        pixels = np.zeros((1, preprocess.height_px, preprocess.width_px, 3), np.uint8)
        values = np.empty((len(views), 0, predict(pixels).shape[1]), np.float32)
    return _Part(values, np.array(rows, dtype=np.int64), broken, time.monotonic() - started)


def _read(
    split: Split, indices: range, preprocess: Preprocess, batch_size: int
) -> Iterator[_Block]:
    """Yield prepared images in order; threads decode the next batches meanwhile."""

    def read(start: int) -> _Block:
        chosen = indices[start : start + batch_size]
        pixels = np.empty((len(chosen), preprocess.height_px, preprocess.width_px, 3), np.uint8)
        rows: list[int] = []
        broken: list[tuple[str, str]] = []
        for index in chosen:
            try:
                pixels[len(rows)] = prepare(split.images, index, preprocess)
            except ImageError as error:
                broken.append((split.images.name(index), str(error)))
                continue
            rows.append(index)
        return _Block(pixels[: len(rows)], rows, broken, len(chosen))

    return ordered_map(read, range(0, len(indices), batch_size), ahead=1)


def _save(path: Path, stamp: str, part: _Part) -> None:
    buffer = io.BytesIO()
    np.savez(
        buffer,
        values=part.values,
        rows=part.rows,
        broken=np.array(json.dumps(part.broken)),
        seconds=np.array(part.seconds),
        made_from=np.array(stamp),
    )
    write_atomic(path, buffer.getvalue())


def _load(path: Path, stamp: str) -> _Part | None:
    """Return a part that was made from the same, or None."""
    if not path.is_file():
        return None
    try:
        # Opened here, because numpy leaves a damaged file open. zip checks a CRC of each array.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["made_from"]) != stamp:
                return None
            broken = [(name, reason) for name, reason in json.loads(str(stored["broken"]))]
            return _Part(stored["values"], stored["rows"], broken, float(stored["seconds"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None  # damaged: made again

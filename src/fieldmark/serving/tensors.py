"""Tensors of the Open Inference Protocol, V2, as they lie in a body: JSON, binary or both."""

import base64
import binascii
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from fieldmark.serving.replies import BadBody, shown

LENGTH_HEADER = "inference-header-content-length"
_KINDS = {"dict": "an object", "list": "a list", "str": "a string"}
_MAX_SIDES = 8  # of a shape
_MAX_TENSORS = 16  # of inputs or outputs; no model has as many


@dataclass(frozen=True, slots=True)
class Asked:
    """An output that a request asks for."""

    name: str
    classification: int = 0  # 0: the tensor; else the best so many classes as text
    is_binary: bool = False


@dataclass(frozen=True, slots=True)
class Inference:
    """A request to infer, parsed and not yet compared with the model."""

    inputs: dict[str, npt.NDArray[np.uint8] | list[bytes]]
    outputs: list[Asked] | None  # None: none were named, so all
    id: str | None = None
    is_binary: bool = False  # of outputs that do not say
    timeout_us: int | None = None


def parse_inference(body: bytes, length: str | None, max_parts: int, max_images: int) -> Inference:
    """Return the request in a body.

    Args:
        length: the header Inference-Header-Content-Length, bytes of the JSON before the binary
            tensors. None: all is JSON. "0": the body is one encoded image, and the outputs are
            binary.
        max_parts: values that the JSON may have, before it becomes objects.
        max_images: elements that a tensor of BYTES may have, before they become objects.

    Raises:
        BadBody: it does not follow the protocol.
    """
    end = len(body) if length is None else _length(length, len(body))
    if length is not None and end == 0:
        return Inference({"encoded": [body]}, None, is_binary=True)
    num_parts = sum(body.count(mark, 0, end) for mark in (b",", b"[", b"{"))
    if num_parts > max_parts:
        raise BadBody(
            f"the JSON must have at most {max_parts} values. Got about {num_parts}. Send tensors "
            "of so many as binary data."
        )
    try:
        content = json.loads(body[:end])
    except (ValueError, RecursionError):
        raise BadBody("the body must begin with JSON. It does not.") from None
    told = _typed(content, dict, "the JSON")
    parameters = _typed(told.get("parameters", {}), dict, "parameters")
    cursor = _Cursor(body[end:])
    inputs = {}
    for tensor in _few(told.get("inputs"), "inputs"):
        name = _typed(_typed(tensor, dict, "an input").get("name"), str, "name of an input")
        if name in inputs:
            raise BadBody(f"inputs must have different names. Got {shown(name)} twice.")
        inputs[name] = _input(name, tensor, cursor, max_images)
    if cursor.num_left:
        raise BadBody(f"the body must end with its tensors. {cursor.num_left} bytes are left.")
    is_binary = _flag(parameters, "binary_data_output", default=False)
    outputs = None
    if told.get("outputs"):
        outputs = [_asked(item, is_binary) for item in _few(told["outputs"], "outputs")]
        if len({output.name for output in outputs}) < len(outputs):
            raise BadBody("outputs must have different names. One is there twice.")
    identity = told.get("id")
    timeout = parameters.get("timeout")
    return Inference(
        inputs,
        outputs,
        id=None if identity is None else _typed(identity, str, "id"),
        is_binary=is_binary,
        timeout_us=None if not timeout else _count(timeout, "timeout"),
    )


def _length(text: str, num_bytes: int) -> int:
    digits = text.lstrip("0") or "0"
    # Python refuses to read thousands of digits.
    if not text.isdecimal() or len(digits) > 15 or int(digits) > num_bytes:
        raise BadBody(
            f"{LENGTH_HEADER} must be a number of bytes of the body, which has {num_bytes}. "
            f"Got {shown(text)}."
        )
    return int(digits)


@dataclass(slots=True)
class _Cursor:
    """The binary tensors of a body, in order."""

    data: bytes
    place: int = field(default=0)

    @property
    def num_left(self) -> int:
        return len(self.data) - self.place

    def take(self, num_bytes: int, name: str) -> bytes:
        if num_bytes > self.num_left:
            raise BadBody(
                f"binary_data_size of {shown(name)} must be within the body. Got {num_bytes} with "
                f"{self.num_left} bytes left."
            )
        self.place += num_bytes
        return self.data[self.place - num_bytes : self.place]


def _input(
    name: str, tensor: Mapping[str, Any], cursor: _Cursor, max_images: int
) -> npt.NDArray[np.uint8] | list[bytes]:
    kind = _typed(tensor.get("datatype"), str, f"datatype of {shown(name)}")
    shape = _typed(tensor.get("shape"), list, f"shape of {shown(name)}")
    if len(shape) > _MAX_SIDES:
        raise BadBody(f"shape of {shown(name)} must have few sides. Got {len(shape)}.")
    sides = [_count(side, f"shape of {shown(name)}") for side in shape]
    size = _typed(tensor.get("parameters", {}), dict, f"parameters of {shown(name)}").get(
        "binary_data_size"
    )
    raw = None if size is None else cursor.take(_count(size, "binary_data_size"), name)
    if (raw is None) == ("data" not in tensor):
        raise BadBody(f"input {shown(name)} must have either data or binary_data_size.")
    if kind == "BYTES":
        count = prod(sides)
        if count > max_images:
            raise too_many_images(count, max_images)
        elements = _texts(name, tensor["data"]) if raw is None else _elements(name, raw, count)
        if len(elements) != count:
            raise BadBody(
                f"input {shown(name)} must have {count} elements for its shape. "
                f"Got {len(elements)}."
            )
        return elements
    if kind != "UINT8":
        raise BadBody(f"datatype of {shown(name)} must be UINT8 or BYTES. Got {shown(kind)}.")
    try:
        array = (
            np.frombuffer(raw, np.uint8)
            if raw is not None
            else np.array(_flat(tensor["data"]), np.uint8)
        )
        return array.reshape(sides)
    except (ValueError, TypeError, OverflowError):
        raise BadBody(
            f"input {shown(name)} must have {prod(sides)} values from 0 to 255 for its shape. "
            "It has not."
        ) from None


def _flat(data: Any) -> list[int]:
    """Return the whole numbers in lists of lists, or raise ValueError if there is anything else.

    numpy is not asked to: of one long text among short ones it makes an array of long texts.
    """
    level: list[Any] = _typed(data, list, "data")
    while (types := set(map(type, level))) == {list}:
        level = list(chain.from_iterable(level))
    if not types <= {int}:
        raise ValueError
    return level


def _texts(name: str, data: Any) -> list[bytes]:
    """Return the elements of BYTES in JSON: base64, since encoded images are no text."""
    found = []
    for text in _typed(data, list, f"data of {shown(name)}"):
        try:
            found.append(
                base64.b64decode(_typed(text, str, f"data of {shown(name)}"), validate=True)
            )
        except (binascii.Error, ValueError):
            raise BadBody(f"data of {shown(name)} must be base64. Got {shown(text)}.") from None
    return found


def _elements(name: str, raw: bytes, count: int) -> list[bytes]:
    """Return the elements of binary BYTES: each behind its length, uint32, little-endian."""
    found: list[bytes] = []
    place = 0
    while place < len(raw) and len(found) < count:
        (size,) = struct.unpack_from("<I", raw, place) if len(raw) - place >= 4 else (len(raw),)
        place += 4
        if size > len(raw) - place:
            raise BadBody(
                f"input {shown(name)} must be elements behind their lengths. It is cut off."
            )
        found.append(raw[place : place + size])
        place += size
    if place < len(raw):
        raise BadBody(
            f"input {shown(name)} must have {count} elements for its shape. "
            f"{len(raw) - place} bytes are left."
        )
    return found


def too_many_images(count: int, most: int) -> BadBody:
    """Return the error of a request that has none or too many."""
    return BadBody(f"a request must have 1 to {most} images. Got {count}.")


def _asked(item: Any, is_binary: bool) -> Asked:
    told = _typed(item, dict, "an output")
    parameters = _typed(told.get("parameters", {}), dict, "parameters of an output")
    return Asked(
        _typed(told.get("name"), str, "name of an output"),
        classification=_count(parameters.get("classification", 0), "classification"),
        is_binary=_flag(parameters, "binary_data", default=is_binary),
    )


def _few(value: Any, what: str) -> list[Any]:
    found: list[Any] = _typed(value, list, what)
    if len(found) > _MAX_TENSORS:
        raise BadBody(f"{what} must be at most {_MAX_TENSORS}. Got {len(found)}.")
    return found


def _typed(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        wanted = _KINDS[kind.__name__]
        raise BadBody(f"{what[:80]} must be {wanted}. Got {shown(value)}.")
    return value


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise BadBody(f"{name} must be true or false. Got {shown(value)}.")
    return value


def _count(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**40:
        raise BadBody(f"{what[:80]} must be a whole number, 0 or more. Got {shown(value)}.")
    return value


def to_body(
    head: dict[str, Any],
    outputs: Sequence[tuple[Asked, npt.NDArray[np.float32] | list[list[str]]]],
) -> tuple[bytes, int | None]:
    """Return a reply's body, and the bytes of its JSON where binary tensors follow it.

    Args:
        head: what stands beside the outputs.
        outputs: tensors (N, C), or for a classification N lists of texts.
    """
    described, parts = [], []
    for asked, value in outputs:
        is_text = isinstance(value, list)
        shape = [len(value), len(value[0])] if isinstance(value, list) else list(value.shape)
        entry: dict[str, Any] = {
            "name": asked.name,
            "datatype": "BYTES" if is_text else "FP32",
            "shape": shape,
        }
        if asked.is_binary:
            raw = _to_raw(value)
            entry["parameters"] = {"binary_data_size": len(raw)}
            parts.append(raw)
        elif isinstance(value, list):
            entry["data"] = [text for row in value for text in row]
        else:
            entry["data"] = value.ravel().tolist()
        described.append(entry)
    text = json.dumps(head | {"outputs": described}).encode()
    return b"".join([text, *parts]), len(text) if parts else None


def _to_raw(value: npt.NDArray[np.float32] | list[list[str]]) -> bytes:
    if isinstance(value, list):
        encoded = [text.encode() for row in value for text in row]
        return b"".join(struct.pack("<I", len(text)) + text for text in encoded)
    return np.ascontiguousarray(value, "<f4").tobytes()

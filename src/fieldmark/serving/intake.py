"""What a request carries: its body within bounds, the images in it, its deadline, its id."""

import base64
import binascii
import json
import math
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request

from fieldmark.errors import BodyTooLarge
from fieldmark.serving.compression import inflate
from fieldmark.serving.limits import Limits
from fieldmark.serving.replies import BadBody, BadQuery, shown
from fieldmark.serving.service import Service

TIMEOUT_HEADER = "x-request-timeout-seconds"  # as Ray Serve names it
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_MAX_PART_HEAD_BYTES = 2_048  # its parser takes long over odd ones, as over the next
_MAX_TYPE_BYTES = 1_024  # of a content type; a boundary has 70 at most (RFC 2046, section 5.1.1)
_LARGE_BYTES = 1_000_000  # of JSON, which takes long enough to be in the way of others
SPARE_PARTS = 1000  # values in JSON beside images
_DATA_URI = re.compile(r"data:image/[a-z0-9.+-]{1,32};base64,", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Images:
    """The encoded images of a request, in order."""

    encoded: list[bytes]
    names: list[str | None]  # as the client calls them
    is_list: bool  # several could have come, so each is answered with its own status


def request_id(headers: Mapping[str, str]) -> str:
    """Return the caller's X-Request-Id if it is sane, else a new one."""
    given = headers.get("x-request-id", "")
    # Random enough to find a request by; a secret would cost a call of the system.
    return given if _ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


def deadline_of(headers: Mapping[str, str], limits: Limits) -> float:
    """Return when the answer is late, on the clock of time.monotonic().

    Raises:
        BadQuery: the header is no number of seconds above 0.
    """
    given = headers.get(TIMEOUT_HEADER)
    seconds = limits.timeout_s
    if given is not None:
        try:
            seconds = float(given)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise BadQuery(
                f"{TIMEOUT_HEADER} must be a number of seconds above 0. Got {shown(given)}."
            )
    return time.monotonic() + min(seconds, limits.max_timeout_s)


async def read_images(request: Request, service: Service) -> Images:
    """Return the images of a body: one as it is, several as multipart/form-data or as JSON.

    Any other body is one image, whatever its type is called.

    Raises:
        BodyTooLarge: there are too many bytes.
        Busy: too many bodies are arriving.
        BadBody: the form or the JSON cannot be read, or has no image or too many.
        Late: the deadline passed before large JSON was read.
    """
    limits = service.limits
    named = request.headers.get("content-type", "")
    if len(named) > _MAX_TYPE_BYTES:
        raise BadBody(
            f"the content type must have at most {_MAX_TYPE_BYTES} bytes. Got {len(named)}."
        )
    kind, options = parse_options_header(named)
    if kind == b"multipart/form-data":
        body = await read_body(request, service, limits.max_request_bytes)
        return _from_form(body, options.get(b"boundary", b""), limits)
    if kind == b"application/json":
        body = await read_body(request, service, limits.max_request_bytes)
        if body.lstrip()[:1] in (b"{", b"["):
            if len(body) <= _LARGE_BYTES:
                return _from_json(body, limits)
            unpack = partial(_from_json, body, limits)
            return await service.apart(unpack, deadline_of(request.headers, limits))
        return Images([body], [None], is_list=False)
    return Images([await read_body(request, service, limits.max_body_bytes)], [None], is_list=False)


async def read_body(request: Request, service: Service, max_bytes: int) -> bytes:
    """Return the body, as it was before Content-Encoding.

    Raises:
        BodyTooLarge: it has too many bytes; before reading, if its declared size is too large.
        Busy: too many bodies are arriving.
        BadBody: it is not compressed as its header says.
        Late: the deadline passed before it was inflated.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise BodyTooLarge(
            f"body must have at most {max_bytes} bytes. Got {shown(declared)}. Resize and retry."
        )
    body: bytes | bytearray = b""
    try:
        is_whole = False
        while not is_whole:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            is_whole = not message.get("more_body", False)
            chunk = message.get("body", b"")
            if not chunk:  # as the last one may be
                continue
            await service.arrivals.add(len(chunk), lambda: "answered" in request.scope["state"])
            if body:
                body = bytearray(body) if isinstance(body, bytes) else body
                body += chunk
            else:
                body = chunk  # most come as one, which is not copied
            if len(body) > max_bytes:
                raise BodyTooLarge(
                    f"body must have at most {max_bytes} bytes. Got more. Resize and retry."
                )
        encoding = request.headers.get("content-encoding", "")
        if not encoding:
            return bytes(body)
        unpack = partial(inflate, bytes(body), encoding, max_bytes)
        return await service.apart(unpack, deadline_of(request.headers, service.limits))
    finally:
        service.arrivals.remove(len(body))


def _from_form(body: bytes, boundary: bytes, limits: Limits) -> Images:
    """Return the parts of multipart/form-data (RFC 2046, section 5.1.1), each as an image."""
    if not boundary:
        raise BadBody("the form must have a boundary in its content type. It has none.")
    # A part lies between two delimiters, each at the beginning of a line; the last is --boundary--.
    # More of them than may be are not looked for.
    delimiter = b"\r\n--" + boundary
    at = first = -2 if body.startswith(delimiter[2:]) else body.find(delimiter)
    parts: list[tuple[int, int]] = []
    is_ended = False
    while at != -1 and len(parts) <= limits.max_images:
        start = at + len(delimiter)
        is_ended = body.startswith(b"--", start)
        if is_ended:
            break
        at = body.find(delimiter, start)
        parts.append((start, len(body) if at == -1 else at))
    if len(parts) > limits.max_images:
        raise BadBody(
            f"a request must have at most {limits.max_images} images. Got more. "
            "Send several requests."
        )
    if body[: len(body) if first == -1 else max(first, 0)].strip():
        raise _unreadable()
    if not is_ended:
        raise BadBody("the form must end with its boundary. It does not. Send it again.")
    if not parts:
        raise BadBody("the form must have an image in each part. It has no part.")
    found = [_part(body, start, end) for start, end in parts]
    return Images([data for _, data in found], [name for name, _ in found], is_list=True)


def _part(body: bytes, start: int, end: int) -> tuple[str | None, bytes]:
    """Return the name and the content of a part, which lies from the end of its delimiter on."""
    head = body.find(b"\r\n", start, end)  # nothing but blanks may stand before that
    content = body.find(b"\r\n\r\n", head, end)  # the same line end, where there is no header
    is_whole = head != -1 and content != -1 and not body[start:head].strip(b" \t")
    if not is_whole or content - head > _MAX_PART_HEAD_BYTES:
        raise _unreadable()
    text = None
    for header in body[head:content].split(b"\r\n")[1:]:
        field, colon, value = header.partition(b":")
        if not colon:
            raise _unreadable()
        if field.strip().lower() == b"content-disposition":
            options = parse_options_header(value)[1]
            name = options.get(b"filename") or options.get(b"name")
            text = None if name is None else name.decode("utf-8", "replace")[:255]
    return text, body[content + 4 : end]


def _unreadable() -> BadBody:
    return BadBody("the form must be what its content type says. It cannot be read.")


def _from_json(body: bytes, limits: Limits) -> Images:
    example = 'send {"images": ["BASE64", ...]}'
    # A value that is small as text may be large as an object; base64 has none of these marks.
    if sum(map(body.count, (b",", b"[", b"{"))) > 2 * limits.max_images + SPARE_PARTS:
        raise BadBody(
            f"the JSON must be a short list of images. It has far more values: {example}."
        )
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise BadBody(f"the body must be JSON. It is not: {example}.") from None
    if not isinstance(content, dict) or set(content) != {"images"}:
        raise BadBody(f"the JSON must have the one key images. It has not: {example}.")
    texts = content["images"]
    if not isinstance(texts, list) or not 1 <= len(texts) <= limits.max_images:
        raise BadBody(f"images must be a list of 1 to {limits.max_images}. It is not: {example}.")
    encoded = []
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise BadBody(f"images[{index}] must be a string of base64. It is not: {example}.")
        data = _DATA_URI.match(text)
        try:
            encoded.append(base64.b64decode(text[data.end() if data else 0 :], validate=True))
        except (binascii.Error, ValueError):
            raise BadBody(
                f"images[{index}] must be base64, or a data URI of an image. Got {shown(text)}."
            ) from None
    return Images(encoded, [None] * len(encoded), is_list=True)

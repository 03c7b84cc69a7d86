"""Bodies that are compressed on their way: Content-Encoding and Accept-Encoding."""

import re
import zlib

from fieldmark.errors import BodyTooLarge
from fieldmark.serving.replies import BadBody, shown

_WINDOW_BITS = {"gzip": 31, "deflate": 15}  # of zlib
_REPLY_LEVEL = 1  # of zlib: floats hardly shrink further


def inflate(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Return a body as it was before Content-Encoding: gzip, deflate (zlib) or identity.

    Raises:
        BodyTooLarge: it has more than `max_bytes` then; no more than that is ever held.
        BadBody: it is not compressed so, or in another way.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in _WINDOW_BITS:
        raise BadBody(f"Content-Encoding must be gzip or deflate. Got {shown(encoding)}.")
    engine = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        found = engine.decompress(body, max_bytes + 1)
    except zlib.error:
        raise BadBody(f"the body must be {encoding}, as its header says. It is not.") from None
    if len(found) > max_bytes:
        raise BodyTooLarge(f"body must have at most {max_bytes} bytes. Got more when inflated.")
    if not engine.eof or engine.unused_data:
        raise BadBody(f"the body must be one whole {encoding} stream. It is not.")
    return found


def compress(body: bytes, accepted: str) -> tuple[bytes, str | None]:
    """Return a reply's body in an encoding that the client takes, and its name; None: as it is.

    Args:
        accepted: the header Accept-Encoding. gzip is preferred to deflate (zlib).
    """
    offers = [offer.replace(" ", "").partition(";") for offer in accepted.lower().split(",")]
    names = {name for name, _, quality in offers if not re.fullmatch(r"q=0(\.0*)?", quality)}
    for name, window_bits in _WINDOW_BITS.items():
        if name in names:
            engine = zlib.compressobj(_REPLY_LEVEL, wbits=window_bits)
            return engine.compress(body) + engine.flush(), name
    return body, None

"""What the service takes, and how long it tries: every bound in one place."""

import math
from dataclasses import dataclass, fields

from fieldmark.errors import ConfigError
from fieldmark.preprocess import MAX_PIXELS

HTTP_FORMATS = ("JPEG", "PNG", "WEBP")
SLOW_S = 1.0  # what arrives for longer makes room for others before anything else does
_MAY_BE_0 = ("max_wait_s", "drain_s", "max_per_address")


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the service; sizes in bytes, times in seconds.

    Raises:
        ConfigError: one is not a finite number above 0, or two do not fit each other.
    """

    max_body_bytes: int = 10_000_000  # of an image
    max_request_bytes: int = 64_000_000  # of a request with several
    max_pixels: int = MAX_PIXELS  # of an image
    max_images: int = 32  # of one request
    max_inside: int = 256  # images waiting, decoding or in the model
    max_inside_bytes: int = 256_000_000  # of their encoded bytes
    max_reading_bytes: int = 512_000_000  # of bodies that are still arriving
    timeout_s: float = 10.0  # of a request that names none
    max_timeout_s: float = 60.0  # that a client can ask for
    max_batch_size: int = 8
    max_wait_s: float = 0.0  # for a batch to fill
    hung_after_s: float = 60.0  # one batch this long in the model means that it hangs
    max_connections: int = 2048
    max_per_address: int = 0  # connections of one client's address; 0: any number of them
    header_timeout_s: float = 10.0  # for the first line and the headers of a request to arrive
    body_timeout_s: float = 30.0  # for its body
    write_timeout_s: float = 30.0  # for a client to take its answer
    idle_timeout_s: float = 75.0  # between requests of a connection; a proxy's is often 60
    drain_s: float = 5.0  # between SIGTERM and the last new connection

    @property
    def largest_batch(self) -> int:
        """The images that can come together in the model."""
        return min(self.max_batch_size, self.max_inside)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in _MAY_BE_0 else "above 0"
            if not math.isfinite(value) or value < 0 or (value == 0 and least != 0):
                wanted = "at least 0" if least == 0 else "above 0"
                raise ConfigError(f"{field.name} must be a finite number {wanted}. Got {value}.")
        for small, large in (("max_images", "max_inside"), ("timeout_s", "max_timeout_s")):
            if getattr(self, small) > getattr(self, large):
                raise ConfigError(
                    f"{small} must be at most {large}, {getattr(self, large):g}. "
                    f"Got {getattr(self, small):g}."
                )

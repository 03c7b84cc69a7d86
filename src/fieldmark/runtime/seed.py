"""Randomness as a function: every random draw starts from a seed derived from what it is for."""

import hashlib
import json
import operator


def derive_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2**63) that depends on each part, on its type and on its place.

    The same parts give the same seed in every process, on every machine and Python version.
    """
    plain = [part if isinstance(part, str) else int(operator.index(part)) for part in parts]
    digest = hashlib.blake2b(json.dumps(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

"""Hundreds of files that a service should survive: damaged, lying, enormous, foreign, or odd.

All are made here, from fixed seeds, and each says which statuses answer it.
"""

import io
import itertools
import struct
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, PngImagePlugin

GOOD, TOO_LARGE, NO_IMAGE = {200}, {413}, {422}
ANY = GOOD | TOO_LARGE | NO_IMAGE
FORMATS = ("JPEG", "PNG", "WEBP")
_PNG = b"\x89PNG\r\n\x1a\n"


def corpus() -> list[tuple[str, bytes, set[int]]]:
    """Return (name, content, statuses) of more than 500 files; every name is different."""
    kinds = (_truncated, _flipped, _noise, _sizes, _bombs, _foreign, _polyglots, _exif, _odd)
    return [
        (f"{kind.__name__[1:]}-{name}", data, statuses)
        for kind in kinds
        for name, data, statuses in kind()
    ]


def photo(mode: str = "RGB", size: tuple[int, int] = (48, 40), seed: int = 0) -> Image.Image:
    """Return a smooth image with some noise, as photographs are."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(format: str, image: Image.Image | None = None, **options) -> bytes:
    """Return an image as a file."""
    out = io.BytesIO()
    (image or photo()).save(out, format, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, pixels: bytes, *chunks: bytes) -> bytes:
    """Return a PNG of any claims about itself."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"".join([_PNG, head, *chunks, chunk(b"IDAT", pixels), chunk(b"IEND", b"")])


def _truncated() -> Iterator[tuple[str, bytes, set[int]]]:
    for format in FORMATS:
        data = encoded(format)
        for share in range(40):
            end = len(data) * share // 40
            yield f"{format}-{share}", data[:end], NO_IMAGE | ({200} if share > 30 else set())


def _flipped() -> Iterator[tuple[str, bytes, set[int]]]:
    for format, seed in itertools.product(FORMATS, range(60)):
        data, draw = bytearray(encoded(format)), np.random.default_rng(seed)
        for _ in range(1 + seed % 8):
            data[draw.integers(len(data))] ^= 1 << int(draw.integers(8))
        yield f"{format}-{seed}", bytes(data), ANY


def _noise() -> Iterator[tuple[str, bytes, set[int]]]:
    heads = (b"\xff\xd8\xff\xe0", _PNG, b"RIFF\xff\xff\xff\x7fWEBPVP8 ", b"GIF89a", b"BM", b"II*\0")
    for head, seed in itertools.product(heads, range(12)):
        rest = np.random.default_rng(seed).bytes(10 + 37 * seed)
        yield f"{head[:4].hex()}-{seed}", head + rest, NO_IMAGE | TOO_LARGE


def _sizes() -> Iterator[tuple[str, bytes, set[int]]]:
    pixels = zlib.compress(bytes(1000))
    for width, height in itertools.product(
        (0, 1, 65_535, 1_000_000, 2**31 - 1, 2**32 - 1), repeat=2
    ):
        yield f"png-{width}x{height}", png(width, height, 8, 2, pixels), ANY
    jpeg = encoded("JPEG")
    place = jpeg.index(b"\xff\xc0") + 5
    for height, width in itertools.product((0, 1, 30_000, 65_535), repeat=2):
        changed = jpeg[:place] + struct.pack(">HH", height, width) + jpeg[place + 4 :]
        yield f"jpeg-{width}x{height}", changed, ANY
    for depth, colour in itertools.product((0, 1, 2, 3, 4, 8, 16, 32), (0, 2, 3, 4, 6, 7)):
        yield f"depth-{depth}-colour-{colour}", png(8, 8, depth, colour, pixels), ANY
    for size in ((1, 1), (1, 3000), (3000, 1), (2, 2), (999, 3)):
        for format in FORMATS:
            image = photo(size=size)
            yield f"{format}-{size[0]}x{size[1]}", encoded(format, image), GOOD | NO_IMAGE


def _bombs() -> Iterator[tuple[str, bytes, set[int]]]:
    for side in (8_000, 20_000, 60_000):
        # Rows of one bit a pixel compress a thousand times, and once more as a stream.
        rows = zlib.compressobj(9)
        row = bytes(1 + side // 8)
        data = b"".join(rows.compress(row) for _ in range(min(side, 8_000))) + rows.flush()
        yield f"png-{side}", png(side, side, 1, 0, data), TOO_LARGE
    pixels = zlib.compress(b"\0" + bytes(3))
    huge = zlib.compress(bytes(100_000_000), 9)
    text = b"comment\0\0" + huge
    yield "png-text", png(1, 1, 8, 2, pixels, chunk(b"zTXt", text)), ANY
    yield "png-unicode", png(1, 1, 8, 2, pixels, chunk(b"iTXt", b"a\0\1\0\0\0" + huge)), ANY
    yield "png-profile", png(1, 1, 8, 2, pixels, chunk(b"iCCP", b"a\0\0" + huge)), ANY
    yield "png-rows", png(1, 1, 8, 2, huge), ANY
    many = b"".join(chunk(b"tEXt", b"k%d\0v" % index) for index in range(20_000))
    yield "png-chunks", png(1, 1, 8, 2, pixels, many), ANY
    yield "jpeg-segments", b"\xff\xd8" + (b"\xff\xfe\xff\xff" + bytes(65_533)) * 20, NO_IMAGE


def _foreign() -> Iterator[tuple[str, bytes, set[int]]]:
    for format in ("GIF", "BMP", "TIFF", "ICO", "PPM", "TGA", "PCX", "SGI", "JPEG2000", "DDS"):
        yield format, encoded(format), NO_IMAGE
    texts = {
        "empty": b"",
        "zero": b"\0",
        "zeros": bytes(5000),
        "text": b"hello",
        "html": b"<html><script>alert(1)</script></html>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "xml": b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
        "url": b"http://127.0.0.1:1/image.jpg",
        "path": b"/etc/passwd",
        "pickle": b"cos\nsystem\n(S'true'\ntR.",
        "elf": b"\x7fELF\2\1\1" + bytes(100),
        "pdf": b"%PDF-1.7\n%%EOF",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit",
        "psd": b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\x10\0\0\0\x10\0\x08\0\3" + bytes(50),
        "fits": b"SIMPLE  =                    T" + b" " * 2850,
        "avif": b"\0\0\0\x20ftypavif" + bytes(60),
        "heic": b"\0\0\0\x18ftypheic" + bytes(60),
        "mp4": b"\0\0\0\x18ftypmp42" + bytes(60),
        "wasm": b"\0asm\1\0\0\0",
        "riff": b"RIFF\x24\0\0\0WAVEfmt " + bytes(30),
        "jpeg-only-start": b"\xff\xd8",
        "jpeg-only-ends": b"\xff\xd8\xff\xd9",
        "png-only-signature": _PNG,
        "webp-only-head": b"RIFF\4\0\0\0WEBP",
        "utf-16": "hello".encode("utf-16"),
    }
    for name, data in texts.items():
        yield name, data, NO_IMAGE


def _polyglots() -> Iterator[tuple[str, bytes, set[int]]]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../../evil", "x")
    for format in FORMATS:
        yield f"{format}-zip", encoded(format) + archive.getvalue(), GOOD | NO_IMAGE
        yield f"{format}-twice", encoded(format) * 2, GOOD | NO_IMAGE
        yield f"{format}-html", encoded(format) + b"<script>alert(1)</script>", GOOD | NO_IMAGE
        yield f"gif-{format}", b"GIF89a" + encoded(format), NO_IMAGE
        yield f"space-{format}", b"\r\n" + encoded(format), NO_IMAGE
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "<?php system('true'); ?>")
    info.add_itxt("XML:com.adobe.xmp", "<x>" * 1000)
    yield "png-php", encoded("PNG", pnginfo=info), GOOD


def _exif() -> Iterator[tuple[str, bytes, set[int]]]:
    for orientation in range(12):
        image = photo()
        exif = image.getexif()
        exif[0x0112] = orientation
        for format in FORMATS:
            yield f"{format}-{orientation}", encoded(format, image, exif=exif), GOOD
    good = image.getexif()
    good[0x0112] = 6
    block = good.tobytes()
    for seed in range(30):
        draw, changed = np.random.default_rng(seed), bytearray(block)
        for _ in range(3):
            changed[6 + int(draw.integers(len(changed) - 6))] = int(draw.integers(256))
        yield f"damaged-{seed}", encoded("JPEG", image, exif=bytes(changed)), GOOD | NO_IMAGE
    endless = b"Exif\0\0II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0\x08\0\0\0"
    yield "endless", encoded("JPEG", exif=endless), GOOD | NO_IMAGE
    many = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(2000)
    yield "many", encoded("JPEG", exif=many), GOOD | NO_IMAGE


def _odd() -> Iterator[tuple[str, bytes, set[int]]]:
    """Images that are right, and seldom."""
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        yield f"png-{mode}", encoded("PNG", photo(mode)), GOOD
    deep = Image.fromarray(np.arange(40 * 48, dtype=np.uint16).reshape(40, 48) * 30)
    yield "png-16-bit", encoded("PNG", deep), GOOD
    yield "png-transparent", encoded("PNG", photo("P"), transparency=3), GOOD
    yield "jpeg-grey", encoded("JPEG", photo("L")), GOOD
    yield "jpeg-cmyk", encoded("JPEG", photo("CMYK")), GOOD
    yield "jpeg-progressive", encoded("JPEG", progressive=True), GOOD
    for subsampling, quality in itertools.product((0, 1, 2), (1, 50, 100)):
        data = encoded("JPEG", subsampling=subsampling, quality=quality)
        yield f"jpeg-{subsampling}-{quality}", data, GOOD
    frames = [photo(seed=seed) for seed in range(20)]
    for format in ("PNG", "WEBP"):
        data = encoded(format, frames[0], save_all=True, append_images=frames[1:])
        yield f"animated-{format}", data, GOOD
    yield "mpo", encoded("MPO", frames[0], save_all=True, append_images=frames[1:]), ANY
    yield "webp-lossless", encoded("WEBP", lossless=True), GOOD
    yield "webp-alpha", encoded("WEBP", photo("RGBA")), GOOD

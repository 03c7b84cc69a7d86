"""preprocess.py: equal to timm pixel for pixel, upright 8-bit RGB, safe with hostile bytes."""

import io
import random
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from timm.data import create_transform

from fieldmark.errors import BodyTooLarge, ImageError, ImageTooLarge
from fieldmark.preprocess import FORMATS, MAX_PIXELS, Preprocess, decode

NOISE = np.random.default_rng(0).integers(0, 256, (640, 640, 3), dtype=np.uint8)


def spec(height_px=64, width_px=64, **changes):
    return Preprocess(
        height_px=height_px, width_px=width_px, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), **changes
    )


def noise(width, height):
    return Image.fromarray(NOISE[:height, :width])


def encode(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width, height, data=b"", depth=8, colour=2):
    """A PNG written by hand: headers that lie, and depths that Pillow cannot save."""

    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def colour_of(encoded, **options):
    """The colour of the top left pixel."""
    image = decode(encoded, **options)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def timm_pixels(image, preprocess):
    transform = create_transform(
        (3, preprocess.height_px, preprocess.width_px),
        is_training=False,
        crop_pct=preprocess.crop_frac,
        crop_mode="center",
        interpolation=preprocess.interpolation,
        normalize=False,
    )
    return transform(image).numpy().transpose(1, 2, 0)


# --- equal to timm ---


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_frac", [0.875, 0.95, 1.0])
@pytest.mark.parametrize("size", [(224, 224), (32, 32), (33, 33), (160, 224), (97, 41)])
def test_equals_timm(size, crop_frac, interpolation):
    preprocess = spec(*size, crop_frac=crop_frac, interpolation=interpolation)
    draw = random.Random(f"{size}{crop_frac}")
    sizes = [(draw.randint(20, 600), draw.randint(20, 600)) for _ in range(10)]
    sizes += [(500, 375), (375, 500), (256, 256), (257, 255), size[::-1], (1, 1), (7, 5), (30, 260)]
    for width, height in sizes:
        image = noise(width, height)
        ours, theirs = preprocess.to_pixels(image), timm_pixels(image, preprocess)
        assert ours.dtype == np.uint8
        assert ours.shape == (*size, 3)
        assert np.array_equal(ours, theirs), f"{width} x {height}"


def test_rounds_halves_of_a_rectangle_as_timm_does():
    # 17 * (61 / 34) is 30.5, and rounds to 30; 17 / (34 / 61) is a hair more, and rounds to 31.
    preprocess = spec(20, 61)
    image = noise(34, 17)
    assert preprocess._size_before_crop(image) == (61, 31)
    assert np.array_equal(preprocess.to_pixels(image), timm_pixels(image, preprocess))


@pytest.mark.parametrize("interpolation", ["nearest", "lanczos"])
def test_other_filters_equal_timm(interpolation):
    preprocess = spec(crop_frac=0.9, interpolation=interpolation)
    image = noise(301, 199)
    assert np.array_equal(preprocess.to_pixels(image), timm_pixels(image, preprocess))


def test_bytes_give_the_pixels_of_the_image():
    preprocess = spec(crop_frac=0.9)
    image = noise(123, 77)
    assert np.array_equal(preprocess(encode(image, "PNG")), preprocess.to_pixels(image))


# --- upright ---

STORED = np.array([[10, 60, 110], [160, 210, 250]], dtype=np.uint8)
UPRIGHT = {  # the EXIF standard's words: where row 0 and column 0 of the stored pixels belong
    1: STORED,  # top, left
    2: STORED[:, ::-1],  # top, right
    3: STORED[::-1, ::-1],  # bottom, right
    4: STORED[::-1],  # bottom, left
    5: STORED.T,  # left, top
    6: np.rot90(STORED, -1),  # right, top
    7: STORED[::-1, ::-1].T,  # right, bottom
    8: np.rot90(STORED),  # left, bottom
}


@pytest.mark.parametrize("orientation", sorted(UPRIGHT))
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_exif_orientation(format, orientation):
    # Blocks of 16 px, so that JPEG keeps them apart.
    image = Image.fromarray(STORED.repeat(16, 0).repeat(16, 1)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    decoded = np.asarray(decode(encode(image, format, exif=exif, **options)))
    assert np.abs(decoded[8::16, 8::16, 0].astype(int) - UPRIGHT[orientation]).max() <= 2


def exif_block(*entries):
    body = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + b"\0\0\0\0"


@pytest.mark.parametrize(
    ("exif", "size"),
    [
        (b"Exif\0\0", (12, 8)),
        (b"Exif\0\0nonsense", (12, 8)),
        (exif_block((0x0112, 2, 4, b"six\0")), (12, 8)),
        (exif_block((0x0112, 3, 1, b"\x63\0\0\0")), (12, 8)),
        # A rotation that can be read, beside a resolution that Pillow cannot write back.
        (exif_block((0x0112, 3, 1, b"\x06\0\0\0"), (0x011A, 7, 4, b"abcd")), (8, 12)),
    ],
)
def test_damaged_exif_does_not_cost_the_image(exif, size):
    assert decode(encode(noise(12, 8), "JPEG", exif=exif)).size == size


def test_damaged_exif_text_in_a_png_does_not_cost_the_image():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n8\nnot hexadecimal\n")
    assert decode(encode(noise(12, 8), "PNG", pnginfo=info)).size == (12, 8)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("space", ["LAB", "XYZ", "sRGB", None])
def test_a_colour_profile_changes_no_pixel(format, space):
    """Training ignores them, so serving does: also those that are not what they should be."""
    from PIL import ImageCms

    profile = b"no profile"
    if space is not None:
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()
    image = noise(12, 8)
    plain, profiled = encode(image, format), encode(image, format, icc_profile=profile)
    assert Image.open(io.BytesIO(profiled)).info["icc_profile"] == profile
    assert np.array_equal(np.asarray(decode(profiled)), np.asarray(decode(plain)))


# --- 8-bit RGB ---


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_rescaled_not_saturated(format):
    grey = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    decoded = np.asarray(decode(encode(Image.fromarray(grey), format)))
    assert decoded[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert (decoded == decoded[..., :1]).all()


def test_16_bit_colour_and_grey_agree():
    row = struct.pack(">6H", 32768, 1000, 65535, 255, 256, 40000)
    colour = decode(png(2, 1, b"\0" + row, depth=16, colour=2))
    grey = decode(png(6, 1, b"\0" + row, depth=16, colour=0))
    assert np.asarray(colour).reshape(-1).tolist() == np.asarray(grey)[0, :, 0].tolist()


def test_32_bit_greys():
    whole = np.array([[-5, 256, 65535, 70000]], dtype=np.int32)
    assert np.asarray(decode(encode(Image.fromarray(whole), "TIFF")))[0, :, 0].tolist() == [
        0,
        1,
        255,
        255,
    ]
    unit = np.array([[0.0, 0.5, 1.0, np.nan, -np.inf]], dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        decoded = np.asarray(decode(encode(Image.fromarray(unit), "TIFF")))
    assert decoded[0, :, 0].tolist() == [0, 128, 255, 0, 0]


def palette_image():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 255, 255, 0, 0] + [0] * 762)
    return image


@pytest.mark.parametrize(
    ("image", "format", "options", "expected"),
    [
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG", {}, (255, 255, 255)),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 128)), "PNG", {}, (255, 127, 127)),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "WEBP", {"lossless": True}, (255, 255, 255)),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "TIFF", {}, (255, 255, 255)),
        (Image.new("LA", (8, 8), (0, 0)), "PNG", {}, (255, 255, 255)),
        (palette_image(), "PNG", {}, (255, 0, 0)),
        (palette_image(), "BMP", {}, (255, 0, 0)),
        (palette_image(), "PNG", {"transparency": 1}, (255, 255, 255)),
        (palette_image(), "PNG", {"transparency": b"\xff\x00"}, (255, 255, 255)),
        (Image.new("RGB", (8, 8), (9, 8, 7)), "PNG", {"transparency": (9, 8, 7)}, (255, 255, 255)),
        (Image.new("L", (8, 8), 5), "PNG", {"transparency": 5}, (255, 255, 255)),
        (Image.new("1", (8, 8), 1), "PNG", {}, (255, 255, 255)),
        (Image.new("L", (8, 8), 77), "JPEG", {}, (77, 77, 77)),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", {}, (254, 0, 0)),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF", {}, (255, 0, 0)),
    ],
)
def test_modes(image, format, options, expected):
    got = colour_of(encode(image, format, **options))
    assert np.abs(np.subtract(got, expected)).max() <= 1


def test_background_is_the_colour_behind_transparency():
    encoded = encode(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG")
    assert colour_of(encoded, background=(1, 2, 3)) == (1, 2, 3)
    assert spec(background=(1, 2, 3))(encoded)[0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "MPO"])
def test_first_frame_only(format):
    red, blue = Image.new("RGB", (16, 16), (254, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 254))
    encoded = encode(red, format, save_all=True, append_images=[blue])
    assert np.abs(np.subtract(colour_of(encoded), (254, 0, 0))).max() <= 3


# --- refused ---


@pytest.mark.parametrize("format", ["GIF", "PPM", "ICO", "TGA", "JPEG2000"])
def test_other_formats_are_refused_by_name(format):
    encoded = encode(noise(16, 16), format)
    with pytest.raises(ImageError, match=f"^image must be one of {', '.join(FORMATS)}. Got "):
        decode(encoded)


def test_formats_narrow_what_is_accepted():
    encoded = encode(noise(16, 16), "BMP")
    assert decode(encoded).size == (16, 16)
    with pytest.raises(ImageError, match="must be one of JPEG, PNG. Got"):
        decode(encoded, formats=("JPEG", "PNG"))
    with pytest.raises(ImageError, match="must be one of JPEG. Got"):
        spec()(encoded, formats=("JPEG",))


def test_empty():
    with pytest.raises(ImageError, match="must not be empty"):
        decode(b"")


@pytest.mark.parametrize("format", FORMATS)
def test_truncated(format):
    encoded = encode(noise(200, 200), format)
    for part in (0.1, 0.5, 0.97):
        with pytest.raises(ImageError, match="^image must"):
            decode(encoded[: int(len(encoded) * part)])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("format", FORMATS)
def test_damaged_bytes_give_an_image_or_an_image_error(format):
    draw = random.Random(format)
    encoded = encode(noise(24, 16), format)
    refusals = []
    for _ in range(150):
        damaged = bytearray(encoded)
        for _ in range(draw.randint(1, 8)):
            # Half of the hits fall on the headers, where the trouble is.
            end = min(len(damaged), draw.choice([80, len(damaged)]))
            damaged[draw.randrange(end)] = draw.randrange(256)
        try:
            assert decode(bytes(damaged)).mode == "RGB"
        except ImageError as error:
            refusals.append(str(error))
    assert len(refusals) > 10
    assert not [text for text in refusals if " object at " in text or "/" in text]


def test_byte_cap():
    encoded = encode(noise(16, 16), "PNG")
    assert decode(encoded, max_bytes=len(encoded)).size == (16, 16)
    with pytest.raises(BodyTooLarge, match=f"at most {len(encoded) - 1} bytes. Got {len(encoded)}"):
        decode(encoded, max_bytes=len(encoded) - 1)
    with pytest.raises(BodyTooLarge):
        spec()(encoded, max_bytes=10)


def test_pixel_cap_is_checked_before_decoding():
    encoded = encode(noise(16, 16), "PNG")
    assert decode(encoded, max_pixels=256).size == (16, 16)
    with pytest.raises(ImageTooLarge, match="at most 255 pixels. Got 16 x 16"):
        decode(encoded, max_pixels=255)
    with pytest.raises(ImageTooLarge):
        spec()(encoded, max_pixels=255)
    # No pixels at all behind the header: refused for its size, so nobody looked for them.
    with pytest.raises(ImageTooLarge, match="Got 8000 x 8000"):
        decode(png(8_000, 8_000))


@pytest.mark.parametrize("side", [12_000, 2**31 - 1])
def test_bombs_are_refused_without_a_warning(side):
    script = (
        "import sys; from fieldmark.errors import ImageTooLarge; from fieldmark import preprocess\n"
        "try: preprocess.decode(sys.stdin.buffer.read())\n"
        "except ImageTooLarge as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], input=png(side, side), capture_output=True, check=True
    )
    assert run.stdout.decode().startswith(f"image must have at most {MAX_PIXELS} pixels. Got")
    assert run.stderr == b""


@pytest.mark.parametrize(("width", "height"), [(1, 60_000), (60_000, 1)])
def test_a_strip_is_refused_before_it_becomes_a_giant(width, height):
    strip = encode(Image.new("L", (width, height)), "PNG")
    with pytest.raises(ImageTooLarge, match="after resizing its short side"):
        spec(224, 224)(strip)
    with pytest.raises(ImageTooLarge, match="after resizing its short side"):
        spec(224, 200)(strip)
    assert spec(1, 1)(strip).shape == (1, 1, 3)


# --- scaled decoding ---


def test_scaled_decoding_never_goes_below_twice_the_need():
    target = 64  # before the crop
    preprocess = spec(56, 56, crop_frac=0.875, scaled_decoding=True)
    reductions = set()
    for width, height in [(1300, 1040), (1040, 1300), (600, 520), (400, 256), (255, 900), (64, 64)]:
        encoded = encode(Image.new("RGB", (width, height)), "JPEG")
        drafted = decode(encoded, draft_px=preprocess._draft_size()).size
        reductions.add(round(width / drafted[0]))
        assert min(drafted) >= min(2 * target, width, height), (width, height)
    assert reductions == {1, 2, 4, 8}


def test_scaled_decoding_follows_the_longer_side_of_a_rectangle():
    preprocess = spec(32, 128, scaled_decoding=True)
    drafted = decode(encode(noise(640, 640), "JPEG"), draft_px=preprocess._draft_size())
    assert drafted.size == (320, 320)


def test_scaled_decoding_is_part_of_the_digest_and_changes_only_large_jpegs():
    plain, scaled = spec(), spec(scaled_decoding=True)
    assert plain.digest() != scaled.digest()
    small, large = encode(noise(120, 120), "JPEG"), encode(noise(520, 520), "JPEG")
    assert np.array_equal(plain(small), scaled(small))
    assert not np.array_equal(plain(large), scaled(large))
    lossless = encode(noise(520, 520), "PNG")
    assert np.array_equal(plain(lossless), scaled(lossless))
    slope = np.linspace(0, 255, 520).astype(np.uint8)[None].repeat(520, 0)
    smooth = encode(Image.fromarray(slope).convert("RGB"), "JPEG", quality=95)
    difference = np.abs(plain(smooth).astype(int) - scaled(smooth).astype(int))
    assert difference.max() <= 3


def test_scaled_decoding_stays_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    half = np.zeros((512, 768, 3), dtype=np.uint8)
    half[:256] = 255  # white above; turned clockwise, white is on the right
    encoded = encode(Image.fromarray(half), "JPEG", exif=exif)
    pixels = spec(32, 32, scaled_decoding=True)(encoded)
    assert pixels[:, :14].max() < 8
    assert pixels[:, 18:].min() > 247


# --- the spec ---


def test_digest_is_of_every_field_and_never_changes():
    # A changed constant would make every package ever written look different from itself.
    assert spec().digest() == DIGEST
    assert Preprocess.model_validate_json(spec().model_dump_json()).digest() == DIGEST
    changes = [
        {"height_px": 65},
        {"width_px": 65},
        {"crop_frac": 0.9},
        {"interpolation": "bilinear"},
        {"mean": (0.5, 0.5, 0.4)},
        {"std": (0.2, 0.2, 0.1)},
        {"scaled_decoding": True},
        {"background": (0, 0, 0)},
    ]
    assert {name for change in changes for name in change} == set(Preprocess.model_fields)
    digests = {spec().model_copy(update=change).digest() for change in changes}
    assert len(digests | {DIGEST}) == len(changes) + 1


DIGEST = "a0aa6d746bac82985a73ec3f19d8c6d94f0ed4e49ff3aec490fb0ada88a844e1"


def test_spec_is_closed():
    with pytest.raises(ValidationError, match="crop_mode"):
        spec(crop_mode="squash")
    with pytest.raises(ValidationError, match="crop_frac"):
        spec(crop_frac=1.1)


# --- threads ---


def test_decoding_in_threads_gives_the_same_and_leaves_the_warning_filters_alone():
    preprocess = spec(crop_frac=0.9)
    encoded = [
        encode(noise(100 + n, 90), ["JPEG", "PNG", "WEBP", "TIFF"][n % 4]) for n in range(24)
    ]
    alone = [preprocess(item) for item in encoded]
    filters = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(preprocess, encoded * 4))
    assert list(warnings.filters) == filters
    assert all(np.array_equal(a, b) for a, b in zip(alone * 4, together, strict=True))


def test_only_the_decoders_of_our_formats_are_loaded():
    script = (
        "import sys; from fieldmark import preprocess\n"
        "try: preprocess.decode(b'RIFF....WEBPxxxx' * 9)\n"
        "except preprocess.ImageError: pass\n"
        "print(*sorted(name for name in sys.modules if name.endswith('ImagePlugin')))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    loaded = run.stdout.decode().split()
    assert "PIL.WebPImagePlugin" in loaded
    assert "PIL.PsdImagePlugin" not in loaded
    assert len(loaded) < 10


def test_transparency_of_a_tall_image_is_composited_as_a_whole_would_be():
    alpha = np.random.default_rng(1).integers(0, 256, (640, 90, 4), dtype=np.uint8)
    image = Image.fromarray(alpha, "RGBA")
    whole = Image.new("RGBA", image.size, (10, 200, 30, 255))
    whole.alpha_composite(image)
    found = decode(encode(image, "PNG"), background=(10, 200, 30))
    assert np.array_equal(np.asarray(found), np.asarray(whole.convert("RGB")))


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded():
    image = encode(noise(64, 64), "JPEG", progressive=True)
    assert decode(image).size == (64, 64)
    with pytest.raises(ImageError, match="at most 100 scans"):
        decode(image + b"\xff\xda" * 101)

"""Regroup a sample of ImageNet photographs into six classes of one's own, with some awkward files.

    .venv/bin/python scripts/superclasses.py SAMPLE_FOLDER... --out FOLDER

Each SAMPLE_FOLDER holds one folder per ImageNet class (its wnid). The result is a plain folder of
class folders, as a user would have it: photographs of mixed sizes, among them one that is rotated
by its EXIF tag, one PNG with transparency, one 16-bit PNG, and one broken JPEG.
"""

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo

# Indices of ImageNet-1k's classes, which are sorted by wnid.
SUPERCLASSES = {
    "bird": [*range(7, 25), *range(80, 101), *range(127, 147)],
    "dog": [*range(151, 269)],
    "food": [*range(924, 958), *range(959, 970)],
    "furniture": [423, 431, 453, 493, 495, 516, 520, 526, 532, 548, 553, 559, 564, 648, 703, 736]
    + [765, 831, 846, 857, 861, 894],
    "other mammal": [*range(102, 107), *range(147, 151), *range(269, 300), *range(330, 389)],
    "vehicle": [403, 404, 405, 407, 408, 436, 444, 466, 468, 472, 484, 510, 511, 547, 554, 555, 561]
    + [565, 569, 573, 575, 576, 586, 603, 609, 612, 625, 627, 628, 654, 656, 661, 665, 670, 671]
    + [675, 705, 717, 734, 751, 757, 779, 780, 802, 803, 812, 814, 817, 820, 829, 833, 847, 864]
    + [866, 867, 870, 871, 874, 880, 895, 914],
}
ROTATED, ALPHA, SIXTEEN_BIT, BROKEN = "rotated.jpg", "alpha.png", "16-bit.png", "broken.jpg"


def main() -> None:
    """Write the folder and print how many images each class has."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("samples", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    counts = regroup(options.samples, options.out)
    print(", ".join(f"{name}: {count}" for name, count in counts.items()))


def regroup(samples: list[Path], out: Path) -> dict[str, int]:
    """Write the folder; return the number of images of each class."""
    wnids = ImageNetInfo().label_names()
    counts = {}
    for name, indices in SUPERCLASSES.items():
        wanted = {wnids[index] for index in indices}
        folders = [f for sample in samples for f in sorted(sample.iterdir()) if f.name in wanted]
        photos = [photo for folder in folders for photo in sorted(folder.iterdir())]
        (out / name).mkdir(parents=True, exist_ok=True)
        for number, photo in enumerate(photos):
            write_scaled(photo, out / name / f"{number:03d}.jpg", number)
        counts[name] = len(photos)
    add_awkward(out)
    return counts


def write_scaled(photo: Path, target: Path, number: int) -> None:
    """Copy a photograph, two of three at another size."""
    if number % 3 == 0:
        target.write_bytes(photo.read_bytes())
        return
    image = Image.open(photo).convert("RGB")
    image.thumbnail((400, 400) if number % 3 == 1 else (260, 260))
    image.save(target, quality=90)


def add_awkward(out: Path) -> None:
    """Turn one image of some classes into an awkward form of itself, and break one."""
    dog, bird, food = out / "dog", out / "bird", out / "food"
    image = Image.open(dog / "001.jpg").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    image.transpose(Image.Transpose.ROTATE_90).save(dog / ROTATED, exif=exif, quality=95)
    image = Image.open(bird / "001.jpg").convert("RGBA")
    alpha = np.full((image.height, image.width), 255, np.uint8)
    alpha[: image.height // 8] = 0
    image.putalpha(Image.fromarray(alpha))
    image.save(bird / ALPHA)
    grey = np.asarray(Image.open(food / "001.jpg").convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(food / SIXTEEN_BIT)
    for folder, name in ((dog, "001.jpg"), (bird, "001.jpg"), (food, "001.jpg")):
        (folder / name).unlink()
    buffer = io.BytesIO()
    Image.open(out / "vehicle" / "001.jpg").convert("RGB").save(buffer, format="JPEG")
    (out / "vehicle" / BROKEN).write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])


if __name__ == "__main__":
    main()

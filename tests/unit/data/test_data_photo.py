import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomCrop, RandomResizedCrop

from fieldmark.config import AugmentConfig
from fieldmark.data.augment import generator
from fieldmark.data.images import ArrayImages
from fieldmark.data.photo import jitter_colors, padded_crop, resized_crop_box, train_pixels
from fieldmark.data.source import open_source


class TorchDraws:
    """Draw as torchvision does, from torch's global generator, in float32."""

    def uniform(self, low, high):
        return torch.empty(1).uniform_(low, high).item()

    def integers(self, low, high):
        return torch.randint(low, high, (1,)).item()


def images(photo):
    return ArrayImages(np.array(photo)[None], "train")


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (500, 500), (900, 60), (60, 900), (3, 2)])
@pytest.mark.parametrize("min_area", [0.08, 0.9])
def test_boxes_equal_torchvisions_for_equal_draws(size, min_area):
    image = Image.new("RGB", size)
    equal = 0
    for seed in range(100):
        torch.manual_seed(seed)
        top, left, height, width = RandomResizedCrop.get_params(
            image, [min_area, 1.0], [3 / 4, 4 / 3]
        )
        torch.manual_seed(seed)
        box = resized_crop_box(*size, TorchDraws(), min_area)
        expected = (left, top, left + width, top + height)
        equal += box == expected
        # torchvision takes the ratio's logarithm and exponential in float32: one pixel, rarely.
        assert np.abs(np.array(box) - np.array(expected)).max() <= 1 or min(size) < 100
    assert equal >= 98


def test_boxes_have_the_distribution_of_torchvisions():
    from scipy import stats

    torch.manual_seed(0)
    theirs = [
        RandomResizedCrop.get_params(Image.new("RGB", (640, 427)), [0.08, 1.0], [3 / 4, 4 / 3])
        for _ in range(2_000)
    ]
    boxes = [resized_crop_box(640, 427, generator("box", index), 0.08) for index in range(2_000)]
    ours = [(top, left, bottom - top, right - left) for left, top, right, bottom in boxes]
    for column in range(4):
        pair = [[box[column] for box in boxes_of] for boxes_of in (ours, theirs)]
        assert stats.ks_2samp(*pair).pvalue > 0.001
    areas = [height * width / (640 * 427) for _, _, height, width in ours]
    assert 0.078 < min(areas) < 0.1
    assert max(areas) > 0.85  # of at most 0.89: a wider box than 4:3 is not allowed
    ratios = [width / height for _, _, height, width in ours]
    assert math.isclose(min(ratios), 3 / 4, abs_tol=0.02)
    assert math.isclose(max(ratios), 4 / 3, abs_tol=0.02)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resized_crops_equal_torchvisions(photos, spec, interpolation):
    spec = spec.model_copy(update={"interpolation": interpolation, "width_px": 40})
    config = AugmentConfig(resized_crop=True)
    for index in range(10):
        rng = generator("photo", index)
        is_flipped = index % 2 == 0
        pixels = train_pixels(images(photos[0]), 0, spec, config, rng, is_flipped=is_flipped)
        left, top, right, bottom = resized_crop_box(640, 427, generator("photo", index), 0.08)
        expected = TF.resized_crop(
            photos[0],
            top,
            left,
            bottom - top,
            right - left,
            [32, 40],
            InterpolationMode(interpolation),
        )
        if is_flipped:
            expected = TF.hflip(expected)
        assert np.array_equal(pixels, np.asarray(expected))


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_padded_crops_equal_torchvisions(photos, mode):
    image = photos[1].crop((100, 100, 132, 124))
    fill_mode = "constant" if mode == "zero" else mode
    for index in range(20):
        top, left = (int(place) for place in generator(index).integers(0, 9, 2))
        expected = TF.crop(TF.pad(image, 4, padding_mode=fill_mode), top, left, 24, 32)
        ours = padded_crop(np.array(image), 4, mode, generator(index))
        assert np.array_equal(ours, np.asarray(expected))
    # torchvision draws from as many places as we do.
    torch.manual_seed(0)
    places = {RandomCrop.get_params(TF.pad(image, 4), (24, 32))[:2] for _ in range(2_000)}
    assert places == {(y, x) for y in range(9) for x in range(9)}


def test_jitter_equals_torchvisions_in_each_order(photos):
    adjust = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation]
    image = photos[0].crop((0, 0, 64, 48))
    orders = set()
    for index in range(30):
        rng = generator("jitter", index)
        factors, order = rng.uniform(0.6, 1.4, 3), rng.permutation(3)
        expected = image
        for which in order:
            expected = adjust[which](expected, float(factors[which]))
        ours = jitter_colors(image, 0.4, generator("jitter", index))
        assert np.array_equal(np.asarray(ours), np.asarray(expected))
        orders.add(tuple(order))
    assert len(orders) == 6


def test_without_changes_it_is_the_evaluation_image(photos, spec, tmp_path):
    for name, color in (("a", (255, 0, 0, 0)), ("b", (0, 0, 255, 128))):
        (tmp_path / name).mkdir()
        Image.new("RGBA", (100, 80), color).save(tmp_path / name / "0.png")
        photos[0].save(tmp_path / name / "large.jpg")
    files = open_source(f"folder:{tmp_path}").splits["all"].images
    spec = spec.model_copy(update={"background": (1, 2, 3), "scaled_decoding": True})
    for index in range(4):
        pixels = train_pixels(files, index, spec, AugmentConfig(), generator(0), is_flipped=None)
        assert np.array_equal(pixels, spec(files.encoded(index)))
    cropped = AugmentConfig(resized_crop=True)
    pixels = train_pixels(files, 0, spec, cropped, generator(0), is_flipped=None)
    assert (pixels == (1, 2, 3)).all()  # the same background, whichever way


def test_random_flips_are_half(photos, spec):
    plain = spec.to_pixels(photos[0])
    config = AugmentConfig(flip="random")
    flipped = 0
    for index in range(200):
        pixels = train_pixels(images(photos[0]), 0, spec, config, generator(index), is_flipped=None)
        is_flipped = np.array_equal(pixels, plain[:, ::-1])
        assert is_flipped or np.array_equal(pixels, plain)
        flipped += is_flipped
    assert 70 < flipped < 130

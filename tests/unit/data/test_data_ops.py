"""Operations against the libraries that have the same ones."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment as timm_ops
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode, v2
from torchvision.transforms import functional as TF

from fieldmark.config import AugmentConfig
from fieldmark.data.augment import generator
from fieldmark.data.images import ArrayImages
from fieldmark.data.ops import (
    _RAND_OPS,
    _TRIVIAL_OPS,
    CIFAR10_POLICY,
    IMAGENET_POLICY,
    _auto_value,
    _rand_value,
    _trivial_value,
    apply_op,
    draw_ops,
)
from fieldmark.data.photo import train_pixels

FILL = (120, 110, 100)
BILINEAR = Image.Resampling.BILINEAR

TORCHVISION = {
    "identity": "Identity",
    "shear-x": "ShearX",
    "shear-y": "ShearY",
    "translate-x": "TranslateX",
    "translate-y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "color": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
}
TIMM = {name: theirs for name, theirs in TORCHVISION.items() if name != "identity"} | {
    "translate-x": "TranslateXRel",
    "translate-y": "TranslateYRel",
    "solarize-add": "SolarizeAdd",
}
SEED_BELOW, SEED_ABOVE = 1, 0  # random() is 0.13 and 0.84
INCREASING = ("posterize", "solarize", "color", "contrast", "brightness", "sharpness")


@pytest.fixture
def image(photos):
    return photos[0].crop((200, 100, 248, 140))


def changed(image, op):
    return np.asarray(apply_op(image, op, fill=FILL, resample=BILINEAR))


SPACES = [
    (space, name)
    for space in (v2.TrivialAugmentWide, v2.AutoAugment)
    for name in sorted(TORCHVISION)
    if TORCHVISION[name] in space._AUGMENTATION_SPACE
]


@pytest.mark.parametrize(("space", "name"), SPACES)
def test_strengths_and_pixels_equal_torchvisions(image, space, name):
    transform = space(interpolation=InterpolationMode.BILINEAR, fill=list(FILL))
    steps = 30 if space is v2.TrivialAugmentWide else 9
    make, is_signed = space._AUGMENTATION_SPACE[TORCHVISION[name]]
    strengths = make(steps + 1, image.height, image.width)
    for step in range(0, steps + 1, 1 if steps == 9 else 5):
        for sign in (1.0, -1.0) if is_signed else (1.0,):
            theirs = 0.0 if strengths is None else sign * float(strengths[step])
            frac = step / steps
            ours = (
                _trivial_value(name, frac, sign)
                if steps == 30
                else _auto_value(name, frac, sign, image.width, image.height)
            )
            value = in_our_unit(name, theirs)
            # Their float32 makes 15.9999 px of 16, and then 15.
            near = 1 if name.startswith("translate") else 1e-4
            assert ours == pytest.approx(value, abs=near)
            expected = transform._apply_image_or_video_transform(
                image, TORCHVISION[name], theirs, InterpolationMode.BILINEAR, transform._fill
            )
            # torchvision moves the image by a translation where a matrix looks up its opposite.
            op = (name, -value if name.startswith("translate") else value)
            difference = np.abs(changed(image, op).astype(int) - np.asarray(expected, dtype=int))
            if name.startswith(("shear", "translate")):  # theirs goes through angles and centres
                assert (difference.max(axis=2) > 1).mean() < 0.03
            else:
                assert difference.max() == 0


def in_our_unit(name, strength):
    if name in ("brightness", "color", "contrast", "sharpness"):
        return 1 + strength
    if name == "solarize":
        return 255 * strength
    return int(strength) if name.startswith("translate") else strength


@pytest.mark.parametrize("name", _RAND_OPS)
def test_randaugment_equals_timms(image, name):
    theirs = TIMM[name] + ("Increasing" if name in INCREASING else "")
    assert theirs in timm_ops._RAND_INCREASING_TRANSFORMS
    for level in (0.0, 2.7, 5.0, 9.0, 10.0):
        for sign in (1.0, -1.0):
            # timm negates where its next draw is above 0.5.
            random.seed(SEED_BELOW if sign > 0 else SEED_ABOVE)
            operation = timm_ops.AugmentOp(
                theirs,
                prob=1.0,
                magnitude=level,
                hparams={"img_mean": FILL, "interpolation": BILINEAR},
            )
            if theirs == "PosterizeIncreasing" and level == 10:
                continue  # timm asks Pillow to keep no bit, and fails
            expected = np.asarray(operation(image))
            value = _rand_value(name, level / 10, sign, image.width, image.height)
            assert np.array_equal(changed(image, (name, value)), expected), (level, sign)
    assert len(_RAND_OPS) == len(timm_ops._RAND_INCREASING_TRANSFORMS)


def test_autoaugments_tables_are_those_of_the_paper():
    for policy, ours in (
        (AutoAugmentPolicy.IMAGENET, IMAGENET_POLICY),
        (AutoAugmentPolicy.CIFAR10, CIFAR10_POLICY),
    ):
        theirs = v2.AutoAugment(policy)._policies
        as_theirs = [
            tuple((TORCHVISION[name], prob, level) for name, prob, level in pair) for pair in ours
        ]
        expected = [tuple((name, p, level or 0) for name, p, level in pair) for pair in theirs]
        assert as_theirs == expected


def draws(config, count, side=100):
    return [draw_ops(config, generator("ops", index), side, side) for index in range(count)]


def test_randaugment_draws_as_timm_does():
    config = AugmentConfig(ops="randaugment", ops_magnitude=5, ops_magnitude_std=1, num_ops=3)
    drawn = draws(config, 4_000)
    counts = Counter(len(ops) for ops in drawn)
    for number, chance in enumerate((1 / 8, 3 / 8, 3 / 8, 1 / 8)):  # each of 3 with probability 0.5
        assert abs(counts[number] / 4_000 - chance) < 0.03
    names = Counter(name for ops in drawn for name, _ in ops)
    assert set(names) == set(_RAND_OPS)
    assert max(names.values()) < 1.3 * min(names.values())
    angles = np.array([value for ops in drawn for name, value in ops if name == "rotate"])
    assert abs((angles > 0).mean() - 0.5) < 0.1
    assert abs(np.abs(angles).mean() - 15) < 0.5  # magnitude 5 of 10, of 30 degrees
    assert abs(np.abs(angles).std() - 3) < 0.4  # 1 of 10
    steady = AugmentConfig(ops="randaugment", ops_magnitude=5, ops_magnitude_std=0)
    assert {abs(v) for ops in draws(steady, 300) for n, v in ops if n == "rotate"} == {15.0}
    most = AugmentConfig(ops="randaugment", ops_magnitude=10, ops_magnitude_std=3)
    angles = [abs(v) for ops in draws(most, 2_000) for n, v in ops if n == "rotate"]
    assert max(angles) == 30.0


def test_trivialaugment_is_one_operation_of_any_strength():
    drawn = draws(AugmentConfig(ops="trivialaugment"), 6_000)
    assert {len(ops) for ops in drawn} == {1}
    names = Counter(ops[0][0] for ops in drawn)
    assert set(names) == set(_TRIVIAL_OPS)
    assert max(names.values()) < 1.4 * min(names.values())
    angles = {round(ops[0][1], 6) for ops in drawn if ops[0][0] == "rotate"}
    assert angles == {round(sign * step * 4.5, 6) for step in range(31) for sign in (1, -1)}


def test_autoaugments_policy_depends_on_the_size():
    for side, policy in ((64, CIFAR10_POLICY), (65, IMAGENET_POLICY)):
        drawn = draws(AugmentConfig(ops="autoaugment"), 3_000, side)
        counts = Counter(name for ops in drawn for name, _ in ops)
        expected = Counter()
        for pair in policy:
            for name, prob, _ in pair:
                expected[name] += prob / len(policy)
        for name in set(counts) | set(expected):
            assert abs(counts[name] / 3_000 - expected[name]) < 0.035


def test_three_augment_is_one_of_three(image):
    drawn = draws(AugmentConfig(ops="three-augment"), 3_000)
    counts = Counter(ops[0][0] for ops in drawn)
    assert set(counts) == {"grayscale", "solarize", "blur"}
    assert min(counts.values()) > 900
    radii = [ops[0][1] for ops in drawn if ops[0][0] == "blur"]
    assert 0.1 <= min(radii) < 0.15
    assert 1.95 < max(radii) <= 2.0
    assert np.array_equal(changed(image, ("grayscale", 0.0)), TF.to_grayscale(image, 3))
    assert np.array_equal(changed(image, ("solarize", 128.0)), TF.solarize(image, 128))
    blurred = timm_ops.gaussian_blur(image, 1.5)
    assert np.array_equal(changed(image, ("blur", 1.5)), np.asarray(blurred))


def test_an_unknown_operation_is_our_own_mistake(image):
    with pytest.raises(ValueError, match="no operation 'swirl'"):
        changed(image, ("swirl", 1.0))


@pytest.mark.usefixtures("global_generators")
@pytest.mark.parametrize("ops", ["randaugment", "trivialaugment", "autoaugment", "three-augment"])
def test_a_photo_is_changed_by_its_own_draws(photos, spec, ops):
    images = ArrayImages(np.array(photos[0])[None], "train")
    config = AugmentConfig(ops=ops)

    def view(seed):
        return train_pixels(images, 0, spec, config, generator(seed), is_flipped=None)

    assert np.array_equal(view(1), view(1))
    different = {view(seed).tobytes() for seed in range(30)}
    assert len(different) > (3 if ops == "three-augment" else 12)
    plain = spec.to_pixels(photos[0])
    for seed in range(30):
        expected = Image.fromarray(plain)
        mean = tuple(round(255 * value) for value in spec.mean)
        for op in draw_ops(config, generator(seed), 32, 32):
            expected = apply_op(expected, op, fill=mean, resample=Image.Resampling.BICUBIC)
        assert np.array_equal(view(seed), np.asarray(expected))


def test_chosen_operations_come_before_colours(photos, spec):
    images = ArrayImages(np.array(photos[0])[None], "train")
    config = AugmentConfig(ops="three-augment", color_jitter=0.5)
    grey = [
        pixels
        for seed in range(40)
        for pixels in [train_pixels(images, 0, spec, config, generator(seed), is_flipped=None)]
        if draw_ops(config, generator(seed), 32, 32)[0][0] == "grayscale"
    ]
    assert len(grey) > 5
    for pixels in grey:  # saturation leaves grey as it is
        assert np.abs(pixels[..., 0].astype(int) - pixels[..., 2]).max() <= 1

import json

import numpy as np
import pytest

from fieldmark.config import AugmentConfig, override
from fieldmark.cookbook import find_recipe
from fieldmark.data.augment import check_augment
from fieldmark.data.images import ArrayImages
from fieldmark.data.labelled import Split
from fieldmark.data.policy import Facts, describe, facts_of, needs_facts, resolve_augment
from fieldmark.data.resident import file_augments
from fieldmark.data.source import open_source
from fieldmark.errors import ConfigError

NAMES = ("none", "light", "standard", "strong", "medical", "auto")


def facts(**changes):
    known = {
        "num_images": 45_000,
        "num_classes": 10,
        "fewest": 4_500,
        "native_px": 32,
        "image_px": 32,
        "is_grey": False,
    }
    return Facts(**{**known, **changes})


CIFAR = facts()
DIGITS = facts(num_images=1_437, fewest=138, is_grey=True, has_black_edge=True)
FEW_SMALL = facts(num_images=200, fewest=12)
PHOTOS = facts(num_images=60_000, fewest=500, native_px=500, image_px=224)
FEW_PHOTOS = facts(num_images=300, fewest=8, native_px=500, image_px=224)
IMAGENET = facts(num_images=1_280_000, num_classes=1_000, fewest=700, native_px=500, image_px=224)
XRAYS = facts(
    num_images=5_000, num_classes=2, fewest=1_200, native_px=1_024, image_px=224, is_grey=True
)


def resolved(policy, known, **given):
    return resolve_augment(AugmentConfig(policy=policy, **given), known)[0]


def differing(config):
    default = AugmentConfig()
    values = config.model_dump()
    return {
        name: value
        for name, value in values.items()
        if value != getattr(default, name) and (name, value) != ("flip", "none")
    }


SHIFT = {"crop_pad_mode": "reflect"}
RANDAUGMENT = {"ops": "randaugment"}  # its numbers are the defaults
MIXING = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}
FLIP = {"flip": "random"}


def crop(min_area):
    return {"resized_crop": True, "resized_crop_min_area_frac": min_area}


TABLE = [
    ("none", CIFAR, {}),
    ("light", CIFAR, {"crop_pad_px": 2, **SHIFT, **FLIP}),
    ("standard", CIFAR, {"crop_pad_px": 4, **SHIFT, **FLIP, "cutout_px": 12}),
    ("strong", CIFAR, {"crop_pad_px": 4, **SHIFT, **FLIP, **MIXING}),
    ("auto", CIFAR, {"crop_pad_px": 4, **SHIFT, **FLIP, "cutout_px": 12}),
    ("auto", FEW_SMALL, {"crop_pad_px": 4, **SHIFT, **FLIP, "cutout_px": 16}),
    ("light", DIGITS, {"crop_pad_px": 2}),
    ("standard", DIGITS, {"crop_pad_px": 3, "rotation_deg": 10.0}),
    ("auto", DIGITS, {"crop_pad_px": 3, "rotation_deg": 15.0, "elastic_px": 1.0, **MIXING}),
    ("light", PHOTOS, {**crop(0.5), **FLIP}),
    ("auto", PHOTOS, {**crop(0.35), **FLIP, "color_jitter": 0.2, "erase_prob": 0.1}),
    ("auto", IMAGENET, {"resized_crop": True, **FLIP, "color_jitter": 0.2, "erase_prob": 0.1}),
    ("strong", PHOTOS, {**crop(0.35), **FLIP, **RANDAUGMENT, "erase_prob": 0.25, **MIXING}),
    ("auto", FEW_PHOTOS, {**crop(0.35), **FLIP, **RANDAUGMENT, "erase_prob": 0.25}),
    (
        "auto",
        XRAYS,
        {
            **crop(0.35),
            **SHIFT,
            "rotation_deg": 15.0,
            "elastic_px": 7.0,
            "erase_prob": 0.25,
            "erase_mode": "constant",
            **MIXING,
        },
    ),
    (
        "medical",
        PHOTOS,
        {
            "crop_pad_px": 14,
            **SHIFT,
            **FLIP,
            "rotation_deg": 15.0,
            "elastic_px": 4.48,
            "color_jitter": 0.1,
        },
    ),
]


@pytest.mark.parametrize(("policy", "known", "expected"), TABLE)
def test_a_policy_is_a_table(policy, known, expected):
    config = resolved(policy, known)
    assert differing(config) == expected
    assert config.policy == "custom"
    assert config.flip != "auto"


@pytest.mark.parametrize("policy", NAMES)
@pytest.mark.parametrize(
    "known", [CIFAR, DIGITS, FEW_SMALL, PHOTOS, FEW_PHOTOS, IMAGENET, XRAYS, facts(image_px=8)]
)
def test_what_a_policy_says_fits_the_images(policy, known):
    config = resolved(policy, known)
    check_augment(config, known.image_px, known.image_px)
    if known.is_grey:
        assert config.flip == "none"
        assert config.ops == "none"
    if known.is_grey and policy != "medical":
        assert not config.color_jitter
    if known.fewest < 50:
        assert not config.mixup_alpha
        assert not config.cutmix_alpha
    if known.native_px <= 64 and policy != "medical":
        assert not any(file_augments(config).values())  # small images stay in memory
    held = Facts(**{**vars(known), "must_be_resident": True})
    assert not any(file_augments(resolved(policy, held)).values())
    again = AugmentConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == config


def test_a_key_that_is_set_wins():
    config = resolved("strong", PHOTOS, flip="none", mixup_alpha=0.8, ops="trivialaugment")
    assert (config.flip, config.mixup_alpha, config.ops) == ("none", 0.8, "trivialaugment")
    assert config.cutmix_alpha == 1.0
    assert resolved("standard", CIFAR, erase_prob=0.2).cutout_px == 0
    assert resolved("strong", PHOTOS, cutout_px=20).erase_prob == 0
    shifted = resolved("standard", PHOTOS, crop_pad_px=8)
    assert (shifted.resized_crop, shifted.crop_pad_px) == (False, 8)
    cropped = resolved("standard", CIFAR, resized_crop=True)
    assert (cropped.resized_crop, cropped.crop_pad_px) == (True, 0)
    assert resolved("standard", CIFAR, sizes=((0.0, 24),)).sizes == ((0.0, 24),)


def test_a_chosen_policy_replaces_a_recipes_own_keys():
    recipe = find_recipe("cifar10-resnet18")
    assert recipe.augment.crop_pad_px == 4
    assert override(recipe, ["augment.policy=none"]).augment == AugmentConfig(policy="none")
    settings = ["augment.policy=auto", "augment.cutout_px=5"]
    assert override(recipe, settings).augment == AugmentConfig(policy="auto", cutout_px=5)
    kept = override(recipe, ["augment.cutout_px=5"]).augment
    assert (kept.crop_pad_px, kept.cutout_px) == (4, 5)


def test_a_custom_configuration_stays_what_it_is():
    given = AugmentConfig(crop_pad_px=4, flip="alternating", cutout_px=12)
    config, line = resolve_augment(given, None)
    assert config == given
    assert line == (
        "augmentation: random 4 px shift, alternating flip, 12 px cutout (as configured)"
    )
    plain, line = resolve_augment(AugmentConfig(), None)
    assert plain == AugmentConfig(flip="none")
    assert line == "augmentation: none (as configured)"
    assert resolve_augment(plain, None)[0] == plain
    assert not needs_facts(given)
    assert needs_facts(AugmentConfig(policy="auto"))


def test_the_line_says_what_and_why():
    _, line = resolve_augment(AugmentConfig(policy="auto", flip="alternating"), CIFAR)
    assert line == (
        "augmentation: random 4 px shift, alternating flip, 12 px cutout (policy auto: standard, "
        "for 45,000 images in 10 classes, the smallest of 4,500, 32 px, colour; set by hand: flip)"
    )
    everything = AugmentConfig(
        resized_crop=True,
        rotation_deg=5,
        elastic_px=1,
        ops="randaugment",
        color_jitter=0.1,
        erase_prob=0.2,
        mixup_alpha=0.1,
        cutmix_alpha=1,
        mix_prob=0.5,
        sizes=((0.0, 16), (0.5, 32)),
    )
    assert describe(everything) == (
        "resized crop of 8% and more, rotation up to 5°, distortion of 1 px, randaugment 2 x 9, "
        "brightness, contrast and saturation ± 10%, erasing of 20% (pixel), mixup 0.1, cutmix 1, "
        "of 50% of the updates, sizes 16, 32 px"
    )


def test_facts_are_those_of_the_images(photos, spec, photo_folder):
    digits = open_source("digits").splits["all"]
    assert facts_of(digits, spec) == Facts(1797, 10, 174, 32, 32, True, True)
    folder = open_source(f"folder:{photo_folder}").splits["all"]
    known = facts_of(folder, spec, must_be_resident=True)
    assert (known.num_images, known.num_classes, known.fewest) == (30, 3, 10)
    assert (known.is_grey, known.has_black_edge, known.must_be_resident) == (False, False, True)
    sides = [max(folder.images.image(index).size) for index in range(30)]
    assert known.native_px == round(np.median(sides))
    assert facts_of(folder, spec) == facts_of(folder, spec)
    # One image in colour among grey ones is enough, and JPEG's noise in grey is not colour.
    grey = np.array(photos[0].convert("L").convert("RGB").resize((40, 30)))
    pixels = np.stack([grey] * 8)
    pixels[:, ::2, :, 0] = np.minimum(pixels[:, ::2, :, 0], 254) + 1
    labels = np.array([0, 1] * 4)
    assert facts_of(Split("train", ArrayImages(pixels, "train"), labels), spec).is_grey
    pixels[3] = np.array(photos[0].resize((40, 30)))
    assert not facts_of(Split("train", ArrayImages(pixels, "train"), labels), spec).is_grey


def test_broken_images_are_no_facts(make_folder, spec):
    root = make_folder({"a": 4, "b": 4})
    for name in ("000", "001"):
        (root / "a" / f"{name}.jpg").write_bytes(b"no image")
    split = open_source(f"folder:{root}").splits["all"]
    assert facts_of(split, spec).num_images == 8
    for path in root.rglob("*.jpg"):
        path.write_bytes(b"no image")
    known = facts_of(split, spec)
    assert (known.native_px, known.is_grey, known.has_black_edge) == (32, False, False)


def test_rivals_that_are_both_set_are_refused():
    with pytest.raises(ValueError, match="both remove a part"):
        AugmentConfig(policy="auto", cutout_px=3, erase_prob=0.1)


def test_pretrained_weights_get_less_where_there_are_few_images() -> None:
    few = Facts(**{**vars(FEW_PHOTOS), "is_pretrained": True})
    many = Facts(**{**vars(FEW_PHOTOS), "is_pretrained": True, "num_images": 50_000})
    resolved, line = resolve_augment(AugmentConfig(policy="auto"), few)
    assert (resolved.ops, resolved.mixup_alpha, resolved.resized_crop) == ("none", 0.0, True)
    assert resolved.resized_crop_min_area_frac == 0.35
    assert (
        resolve_augment(AugmentConfig(policy="light"), FEW_PHOTOS)[0].resized_crop_min_area_frac
        == 0.5
    )
    assert "policy auto: light" in line
    assert "policy auto: standard" in resolve_augment(AugmentConfig(policy="auto"), many)[1]


def test_a_key_that_the_chosen_policy_has_no_use_for_is_one_sentence():
    with pytest.raises(
        ConfigError, match="ops_magnitude means nothing.*augment.policy=light chose"
    ):
        resolved("light", PHOTOS, ops_magnitude=5)
    assert resolved("strong", FEW_PHOTOS, ops_magnitude=5).ops_magnitude == 5
    assert resolved("strong", CIFAR, cutout_px=3).erase_mode == "pixel"  # what gave way is whole

import time

import numpy as np
import pytest
import torch
from PIL import Image

from fieldmark.config import AugmentConfig, DataConfig
from fieldmark.data.augment import alternating_flips, normalise
from fieldmark.data.resident import ResidentBatches, fits_resident, load_resident
from fieldmark.data.source import open_source
from fieldmark.errors import ConfigError, DataError
from shared_data import shared_path

FULL = AugmentConfig(crop_pad_px=2, flip="random", cutout_px=3, mixup_alpha=0.3)
UNMIXED = AugmentConfig(
    crop_pad_px=2,
    flip="random",
    rotation_deg=20,
    elastic_px=1.0,
    erase_prob=0.5,
    erase_mode="constant",
)


@pytest.fixture(scope="module")
def digits():
    split = open_source("digits").splits["all"]
    return split.images.pixels, split.labels


def make(digits, augment=FULL, **changes):
    settings = {
        "mean": (0.3, 0.3, 0.3),
        "std": (0.35, 0.35, 0.35),
        "batch_size": 60,
        "seed": 5,
        "num_classes": 10,
    }
    return ResidentBatches(*digits, augment, **{**settings, **changes})


def take(batches, count, start=0):
    iterator = batches.batches(start)
    return [next(iterator) for _ in range(count)]


def equal(first, second):
    return all(
        torch.equal(a, b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.usefixtures("global_generators")
@pytest.mark.parametrize("start", [1, 28, 29, 30, 61])
def test_a_late_start_yields_what_an_undisturbed_run_yields(digits, start):
    batches = make(digits)
    assert batches.steps_per_epoch == 1797 // 60 == 29
    assert equal(take(batches, 63)[start:], take(make(digits), 63 - start, start))


def test_an_epoch_is_a_permutation_without_its_rest(digits):
    pixels = np.zeros((1797, 8, 8, 3), dtype=np.uint8)
    batches = make((pixels, np.arange(1797)), AugmentConfig())
    labels = [targets for _, targets in take(batches, 58)]
    first, second = torch.cat(labels[:29]), torch.cat(labels[29:])
    for epoch in (first, second):
        assert len(epoch.unique()) == 29 * 60
    assert not torch.equal(first, second)
    assert abs(np.corrcoef(first, np.arange(len(first)))[0, 1]) < 0.1
    other = make((pixels, np.arange(1797)), AugmentConfig(), seed=6)
    assert not torch.equal(take(other, 1)[0][1], labels[0])


def test_images_and_labels_belong_together(digits):
    batches = make(digits, AugmentConfig(flip="alternating"), seed=1)
    pixels, labels = digits
    expected = normalise(torch.from_numpy(pixels), (0.3,) * 3, (0.35,) * 3).permute(0, 3, 1, 2)
    flips = alternating_flips(1, np.arange(1797), 0)
    keys = {}
    for index in range(1797):
        image = expected[index].flip(-1) if flips[index] else expected[index]
        keys.setdefault(image.contiguous().numpy().tobytes(), set()).add(int(labels[index]))
    for images, targets in take(batches, 29):
        for image, label in zip(images, targets, strict=True):
            assert int(label) in keys[image.contiguous().numpy().tobytes()]


@pytest.mark.parametrize("parts", [2, 5])
def test_accumulation_changes_no_input(digits, parts):
    whole = take(make(digits, UNMIXED), 3)
    micro = take(make(digits, UNMIXED, accumulation_steps=parts), 3 * parts)
    joined = [
        tuple(torch.cat(tensors) for tensors in zip(*micro[at : at + parts], strict=True))
        for at in range(0, len(micro), parts)
    ]
    assert {len(images) for images, _ in micro} == {60 // parts}
    assert equal(whole, joined)
    later = take(make(digits, UNMIXED, accumulation_steps=parts), parts, start=2)
    assert equal(later, micro[2 * parts :])


def test_each_update_has_its_own_draws(digits):
    same = (np.repeat(digits[0][:1], 300, axis=0), np.arange(300) % 10)
    for augment in (AugmentConfig(crop_pad_px=2), AugmentConfig(cutout_px=3), FULL):
        first, second = (images for images, _ in take(make(same, augment), 2))
        assert not torch.equal(first, second)
    first, second = (targets for _, targets in take(make(same), 2))
    assert not torch.equal(first.amax(1), second.amax(1))  # the shares of mixing


def test_memory_format_and_types(digits):
    (images, targets), *_ = take(make(digits), 1)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (images.dtype, images.shape) == (torch.float32, (60, 3, 32, 32))
    assert (targets.dtype, targets.shape) == (torch.float32, (60, 10))
    (plain, labels), *_ = take(make(digits, AugmentConfig(), channels_last=False), 1)
    assert plain.is_contiguous()
    assert (labels.dtype, labels.shape) == (torch.int64, (60,))


def test_what_cannot_be_is_an_error(digits):
    with pytest.raises(ConfigError, match="train.batch_size must be at most .* Got 1798 for 1797"):
        make(digits, batch_size=1798)
    with pytest.raises(ConfigError, match="cutout_px must be at most the image's 32 px"):
        make(digits, AugmentConfig(cutout_px=33))
    with pytest.raises(ConfigError, match="augment.color_jitter must be off"):
        make(digits, AugmentConfig(color_jitter=0.1))


def seconds(work):
    start = time.thread_time()
    work()
    return time.thread_time() - start


def test_loading_prepares_as_evaluation_does(photo_folder, spec):
    split = open_source(f"folder:{photo_folder}").splits["all"]
    pixels, labels, broken = load_resident(split, spec, 2**20, num_threads=3)
    assert broken == []
    assert np.array_equal(labels, split.labels)
    for index in range(len(split)):
        assert np.array_equal(pixels[index], spec(split.images.encoded(index)))


def test_scaled_decoding_holds_in_training_as_in_serving(photos, tmp_path, spec):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        photos[0].save(tmp_path / name / "large.jpg")
    split = open_source(f"folder:{tmp_path}").splits["all"]
    scaled = spec.model_copy(update={"scaled_decoding": True})
    pixels, _, _ = load_resident(split, scaled, 2**20)
    assert np.array_equal(pixels[0], scaled(split.images.encoded(0)))
    assert not np.array_equal(pixels[0], spec(split.images.encoded(0)))


def test_broken_images_are_left_out_and_named(make_folder, spec):
    root = make_folder({"a": 70, "b": 70})  # more than one task
    for name in ("a/003.jpg", "b/069.jpg"):
        (root / name).write_bytes(b"no image")
    split = open_source(f"folder:{root}").splits["all"]
    pixels, labels, broken = load_resident(split, spec, 2**20)
    assert [name for name, _ in broken] == ["a/003.jpg", "b/069.jpg"]
    assert all("must be one of JPEG" in reason for _, reason in broken)
    whole = [index for index in range(140) if index not in (3, 139)]
    assert np.array_equal(labels, split.labels[whole])
    assert all(
        np.array_equal(pixels[row], spec(split.images.encoded(index)))
        for row, index in enumerate(whole)
    )


def test_loading_has_its_limits(make_folder, spec):
    root = make_folder({"a": 2, "b": 2})
    split = open_source(f"folder:{root}").splits["all"]
    with pytest.raises(ConfigError, match="Got 4 images of 1 MB. Raise it, or set data.storage"):
        load_resident(split, spec, 4 * 32 * 32 * 3 - 1)
    assert len(load_resident(split, spec, 4 * 32 * 32 * 3)[0]) == 4
    for path in root.rglob("*.jpg"):
        path.write_bytes(b"x")
    with pytest.raises(DataError, match="Got 4 broken of 4, the first a/000.jpg"):
        load_resident(split, spec, 2**20)


def test_small_images_of_one_size_are_held_in_memory(tmp_path, spec, photo_folder):
    digits = open_source("digits").splits["all"]
    data, plain = DataConfig(source="digits"), AugmentConfig()
    assert fits_resident(digits, spec, plain, data)
    assert not fits_resident(digits, spec, AugmentConfig(resized_crop=True), data)
    assert not fits_resident(digits, spec, AugmentConfig(color_jitter=0.1), data)
    small = data.model_copy(update={"max_resident_mb": 5})  # 1797 * 32 * 32 * 3 = 5.3 MB
    assert not fits_resident(digits, spec, plain, small)
    mixed = open_source(f"folder:{photo_folder}").splits["all"]
    assert not fits_resident(mixed, spec, plain, data)
    for index, name in enumerate(("a", "b", "c")):
        (tmp_path / "small" / name).mkdir(parents=True)
        Image.new("RGB", (30, 30 + index)).save(tmp_path / "small" / name / "x.png")
    small_mixed = open_source(f"folder:{tmp_path / 'small'}").splits["all"]
    assert not fits_resident(small_mixed, spec, plain, data)
    for side, expected in ((64, True), (65, False)):
        for name in ("a", "b"):
            folder = tmp_path / str(side) / name
            folder.mkdir(parents=True)
            Image.new("RGB", (side, 40)).save(folder / "x.png")
        split = open_source(f"folder:{tmp_path / str(side)}").splits["all"]
        assert fits_resident(split, spec, plain, data) is expected


def test_storage_can_be_chosen(spec, photo_folder):
    digits = open_source("digits").splits["all"]
    files = DataConfig(source="x", storage="files")
    assert not fits_resident(digits, spec, AugmentConfig(), files)
    resident = DataConfig(source="x", storage="resident")
    mixed = open_source(f"folder:{photo_folder}").splits["all"]
    assert fits_resident(mixed, spec, AugmentConfig(), resident)
    with pytest.raises(ConfigError, match="augment.color_jitter must be off"):
        fits_resident(mixed, spec, AugmentConfig(color_jitter=0.1), resident)


@pytest.mark.shared
def test_cifar10_fits_and_loads(spec):
    split = open_source(f"hf:{shared_path('data', 'cifar10')}").splits["test"]
    assert fits_resident(split, spec, AugmentConfig(), DataConfig(source="x"))
    part = split.subset(np.arange(0, 10_000, 20), "test")
    pixels, labels, broken = load_resident(part, spec, 2**21)
    assert (pixels.shape, broken) == ((500, 32, 32, 3), [])
    assert np.array_equal(pixels[7], np.asarray(split.images.image(140)))
    assert labels[7] == split.labels[140]

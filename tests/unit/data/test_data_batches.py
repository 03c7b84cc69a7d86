"""What both ways of reading share: ranks, repeats, samplers, sizes; on real digits."""

from functools import partial

import numpy as np
import pytest
import torch

from fieldmark.config import AugmentConfig, DataConfig
from fieldmark.data.loader import FileBatches
from fieldmark.data.order import Order
from fieldmark.data.resident import ResidentBatches, fits_resident
from fieldmark.data.sizes import image_px_at
from fieldmark.data.source import open_source
from fieldmark.errors import ConfigError

EVERYTHING = AugmentConfig(
    crop_pad_px=2,
    flip="alternating",
    rotation_deg=15,
    elastic_px=1.0,
    erase_prob=0.5,
    mixup_alpha=0.4,
    cutmix_alpha=1.0,
    mix_prob=0.8,
)
FROM_FILES = EVERYTHING.model_copy(update={"ops": "randaugment", "color_jitter": 0.2})


@pytest.fixture(scope="module")
def split():
    return open_source("digits").splits["all"].subset(np.arange(150), "train")


@pytest.fixture(params=["resident", "files"])
def make(request, split, spec):
    def resident(augment=EVERYTHING, **changes):
        settings = {"batch_size": 24, "seed": 5, "num_classes": 10, **changes}
        pixels = np.stack([spec.to_pixels(split.images.image(i)) for i in range(len(split))])
        return ResidentBatches(
            pixels, split.labels, augment, mean=spec.mean, std=spec.std, **settings
        )

    def files(augment=FROM_FILES, **changes):
        settings = {"batch_size": 24, "seed": 5, "num_classes": 10, "num_workers": 0, **changes}
        return FileBatches(split, spec, augment, **settings)

    return {"resident": resident, "files": files}[request.param]


def take(batches, count, start=0):
    iterator = batches.batches(start)
    taken = [next(iterator) for _ in range(count)]
    iterator.close()
    return taken


def equal(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.usefixtures("global_generators")
@pytest.mark.parametrize(("num_ranks", "accumulation"), [(2, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("repeats", [1, 2])
def test_ranks_have_the_micro_batches_of_one_process(make, num_ranks, accumulation, repeats):
    parts = num_ranks * accumulation
    settings = {"repeats": repeats, "sampler": "balanced"}
    alone = take(make(accumulation_steps=parts, **settings), 8 * parts)
    for rank in range(num_ranks):
        batches = make(accumulation_steps=accumulation, rank=rank, num_ranks=num_ranks, **settings)
        ours = take(batches, 8 * accumulation)
        expected = [
            alone[step * parts + rank * accumulation + place]
            for step in range(8)
            for place in range(accumulation)
        ]
        assert {len(images) for images, _ in ours} == {24 // parts}
        assert equal(ours, expected)
        assert equal(take(batches, 3 * accumulation, 5), expected[5 * accumulation :])


@pytest.mark.parametrize("sampler", ["shuffle", "sqrt"])
def test_a_late_start_yields_what_an_undisturbed_run_yields(make, sampler):
    settings = {"sampler": sampler, "repeats": 2, "accumulation_steps": 2}
    undisturbed = take(make(**settings), 28)
    assert equal(undisturbed[2 * 8 :], take(make(**settings), 12, 8))


def test_the_number_of_workers_changes_nothing(split, spec):
    def read(workers):
        batches = FileBatches(
            split,
            spec,
            FROM_FILES,
            batch_size=24,
            accumulation_steps=2,
            rank=1,
            num_ranks=2,
            seed=5,
            num_classes=10,
            sampler="balanced",
            repeats=2,
            image_px=partial(image_px_at, ((0.0, 16), (0.5, 32)), total_steps=10, default_px=32),
            num_workers=workers,
        )
        return take(batches, 20)

    alone = read(0)
    assert {tuple(images.shape) for images, _ in alone} == {(6, 3, 16, 16), (6, 3, 32, 32)}
    assert equal(alone, read(1))
    assert equal(alone, read(2))


@pytest.mark.parametrize(
    "augment",
    [
        AugmentConfig(crop_pad_px=8),
        AugmentConfig(rotation_deg=30),
        AugmentConfig(elastic_px=1),
        AugmentConfig(erase_prob=1.0),
        AugmentConfig(cutout_px=8),
    ],
)
def test_each_copy_has_its_own_draws(make, augment):
    images, labels = take(make(augment, repeats=3), 1)[0]
    copies = images.reshape(3, 8, -1)
    assert torch.equal(labels, labels[:8].repeat(3))
    for one in range(8):
        assert len({copies[copy, one].numpy().tobytes() for copy in range(3)}) >= 2


def test_copies_are_mirrored_by_turns(make):
    images, _ = take(make(AugmentConfig(flip="alternating"), repeats=2), 1)[0]
    assert torch.equal(images[:12], images[12:].flip(-1))


def test_the_first_copy_is_what_it_is_without_repeats(split, spec):
    settings = {"batch_size": 24, "seed": 5, "num_classes": 10, "num_workers": 0}
    augment = AugmentConfig(crop_pad_px=4, color_jitter=0.3)
    once = take(FileBatches(split, spec, augment, **settings), 1)[0][0]
    twice = take(FileBatches(split, spec, augment, repeats=2, **settings), 1)[0][0]
    assert torch.equal(twice[:12], once[:12])
    assert not torch.equal(twice[12:], once[12:])


def test_the_sampler_decides_the_classes(make, split):
    labels = [labels for _, labels in take(make(AugmentConfig(), sampler="balanced"), 6)]
    counts = np.bincount(torch.cat(labels).numpy(), minlength=10)
    assert counts.sum() == 144
    assert counts.max() - counts.min() <= 1
    order = next(Order(split.labels, 24, 5, sampler="balanced").updates(0))
    assert np.array_equal(labels[0].numpy(), split.labels[order.indices])


def test_sizes_change_at_their_update(make):
    sizes = ((0.0, 16), (0.5, 24), (0.75, 48))
    augment = AugmentConfig(crop_pad_px=2, cutout_px=8, mixup_alpha=0.2, sizes=sizes)
    image_px = partial(image_px_at, sizes, total_steps=8, default_px=32)
    taken = take(make(augment, image_px=image_px, accumulation_steps=2), 16)
    assert [images.shape[-1] for images, _ in taken[::2]] == [16] * 4 + [24] * 2 + [48] * 2
    for images, targets in taken:
        assert images.shape[2] == images.shape[3]
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.dtype == torch.float32
        torch.testing.assert_close(targets.sum(1), torch.ones(12))
    later = make(augment, image_px=image_px, accumulation_steps=2)
    assert equal(take(later, 6, 5), taken[10:])
    with pytest.raises(ConfigError, match="augment.sizes must be from 8 px to 128 px"):
        make(AugmentConfig(sizes=((0.0, 200),)))


def test_the_size_of_evaluation_changes_nothing(make):
    assert equal(take(make(), 3), take(make(image_px=lambda step: 32), 3))


def test_a_smaller_image_is_the_large_one_reduced(make):
    large = take(make(AugmentConfig(crop_pad_px=2)), 1)[0][0]
    small = take(make(AugmentConfig(crop_pad_px=2), image_px=lambda step: 16), 1)[0][0]
    expected = torch.nn.functional.interpolate(large, (16, 16), mode="bilinear", antialias=True)
    assert (small - expected).abs().max() < 2.5 / 255 / 0.24


def test_a_resized_crop_is_read_at_its_size(split, spec):
    settings = {"batch_size": 24, "seed": 5, "num_classes": 10, "num_workers": 0}
    augment = AugmentConfig(resized_crop=True, elastic_px=1.0, ops="trivialaugment", erase_prob=1)
    batches = FileBatches(split, spec, augment, image_px=lambda step: 24, **settings)
    images, _ = take(batches, 1)[0]
    assert images.shape == (24, 3, 24, 24)


def test_targets_are_soft_where_images_are_mixed(make):
    augment = AugmentConfig(mixup_alpha=0.3, mix_prob=0.5)
    kinds = set()
    for _, targets in take(make(augment), 20):
        assert targets.shape == (24, 10)
        kinds.add(bool((targets.amax(1) == 1).all()))
    assert kinds == {True, False}  # both mixed and whole updates


def test_what_files_alone_can_do(split, spec):
    data = DataConfig(source="digits")
    assert fits_resident(split, spec, EVERYTHING, data)
    for key, value in (("ops", "randaugment"), ("color_jitter", 0.1), ("resized_crop", True)):
        augment = AugmentConfig(**{key: value})
        assert not fits_resident(split, spec, augment, data)
        with pytest.raises(ConfigError, match=f"augment.{key} must be off with data.storage"):
            fits_resident(split, spec, augment, DataConfig(source="x", storage="resident"))


def test_what_cannot_be_is_an_error(make):
    with pytest.raises(ConfigError, match="processes times train.accumulation_steps. Got 24 for 5"):
        make(num_ranks=5)

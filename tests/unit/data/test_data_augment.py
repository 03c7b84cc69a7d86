import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.transforms import Compose, Normalize, ToTensor

from fieldmark.config import AugmentConfig
from fieldmark.data.augment import (
    Draws,
    alternating_flips,
    apply,
    check_augment,
    crop_and_flip,
    cut_out,
    draw,
    draw_mixup,
    generator,
    mix_up,
    normalise,
)
from fieldmark.errors import ConfigError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@pytest.fixture
def images(photos):
    """Return 40 real images, 24 x 32, as uint8 (B, H, W, 3)."""
    rng = np.random.default_rng(0)
    pieces = []
    for index in range(40):
        left, top = int(rng.integers(0, 600)), int(rng.integers(0, 390))
        pieces.append(np.array(photos[index % 2].crop((left, top, left + 32, top + 24))))
    return torch.from_numpy(np.stack(pieces))


def draws_of(config, images, *, seed=0, epoch=0, step=0):
    B, H, W, _ = images.shape
    return draw(config, generator(seed, epoch, step), np.arange(B), H, W, seed=seed, epoch=epoch)


@pytest.mark.parametrize(
    ("mode", "torchvision_mode"), [("zero", "constant"), ("reflect", "reflect")]
)
@pytest.mark.parametrize("flip", ["none", "random"])
def test_crops_and_flips_equal_torchvisions(images, mode, torchvision_mode, flip):
    config = AugmentConfig(crop_pad_px=5, crop_pad_mode=mode, flip=flip)
    draws = draws_of(config, images)
    original = images.clone()
    changed = crop_and_flip(images, draws.crop_yx, draws.is_flipped, pad_px=5, mode=mode)
    assert torch.equal(images, original)
    for index, image in enumerate(images):
        padded = TF.pad(Image.fromarray(image.numpy()), 5, padding_mode=torchvision_mode)
        top, left = draws.crop_yx[index]
        expected = TF.crop(padded, int(top), int(left), 24, 32)
        if draws.is_flipped is not None and draws.is_flipped[index]:
            expected = TF.hflip(expected)
        assert np.array_equal(changed[index].numpy(), np.asarray(expected))
    assert (draws.is_flipped is None) == (flip == "none")


def test_offsets_are_drawn_per_image_and_reach_every_place(images):
    draws = draws_of(AugmentConfig(crop_pad_px=2, flip="random"), images.repeat(40, 1, 1, 1))
    assert {tuple(place) for place in draws.crop_yx} == {(y, x) for y in range(5) for x in range(5)}
    assert 700 < draws.is_flipped.sum() < 900


def test_normalisation_equals_torchvisions(images):
    transform = Compose([ToTensor(), Normalize(MEAN, STD)])
    expected = torch.stack([transform(Image.fromarray(image.numpy())) for image in images])
    ours = normalise(images, MEAN, STD).permute(0, 3, 1, 2)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


def test_each_image_flips_in_every_other_epoch():
    indices = np.arange(10_000)
    even, odd = (alternating_flips(3, indices, epoch) for epoch in (0, 1))
    assert np.array_equal(even, ~odd)
    assert np.array_equal(even, alternating_flips(3, indices, 2))
    assert abs(even.mean() - 0.5) < 0.02
    # A hash of the index alone: neither its neighbours nor the batch it is in matter.
    assert np.array_equal(alternating_flips(3, indices[[7, 4, 9]], 0), even[[7, 4, 9]])
    assert abs(np.corrcoef(even[:-1], even[1:])[0, 1]) < 0.05
    other = alternating_flips(4, indices, 0)
    assert abs((other == even).mean() - 0.5) < 0.02


def test_cutout_is_one_square_of_the_mean_inside_each_image(images):
    config = AugmentConfig(cutout_px=10)
    draws = draws_of(config, images)
    before = normalise(images, MEAN, STD)
    assert (before != 0).all()
    after = before.clone()
    cut_out(after, draws.cutout_yx, 10)
    for index in range(len(images)):
        top, left = (int(place) for place in draws.cutout_yx[index])
        expected = before[index].clone()
        expected[top : top + 10, left : left + 10] = 0
        assert torch.equal(after[index], expected)
    assert ((after == 0).sum(dim=(1, 2, 3)) == 10 * 10 * 3).all()


def test_cutout_reaches_every_place_inside():
    images = torch.zeros(2_000, 8, 6, 3, dtype=torch.uint8)
    corners = draws_of(AugmentConfig(cutout_px=5), images).cutout_yx
    assert {tuple(corner) for corner in corners} == {(y, x) for y in range(4) for x in range(2)}
    whole = draws_of(AugmentConfig(cutout_px=6), images).cutout_yx
    assert whole[:, 1].max() == 0


def test_mixup_follows_its_formula(images):
    x_BHWC = normalise(images, MEAN, STD)
    labels = torch.arange(40) % 7
    shares, partners = draw_mixup(0.4, generator("m"), 40)
    mixed, targets = mix_up(x_BHWC, labels, shares, partners, 7)
    assert sorted(partners) == list(range(40))
    for index in range(40):
        share, partner = float(shares[index]), int(partners[index])
        expected = share * x_BHWC[index].double() + (1 - share) * x_BHWC[partner].double()
        torch.testing.assert_close(mixed[index].double(), expected, rtol=0, atol=1e-6)
        row = np.zeros(7)
        row[labels[index]] += share
        row[labels[partner]] += 1 - share
        assert np.allclose(targets[index].numpy(), row, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_of_the_beta_distribution(alpha):
    from scipy import stats

    shares, _ = draw_mixup(alpha, generator("beta", 1), 4_000)
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 0.001


def test_all_together_are_float32_channels_last(images):
    config = AugmentConfig(crop_pad_px=4, flip="random", cutout_px=8, mixup_alpha=0.2)
    labels = torch.arange(40) % 10
    out, targets = apply(
        config, images, labels, draws_of(config, images), mean=MEAN, std=STD, num_classes=10
    )
    assert out.shape == (40, 3, 24, 32)
    assert out.dtype == targets.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(targets.sum(1), torch.ones(40))


def test_nothing_drawn_changes_nothing(images):
    labels = torch.arange(40)
    out, targets = apply(
        AugmentConfig(), images, labels, Draws(), mean=MEAN, std=STD, num_classes=40
    )
    assert torch.equal(out.permute(0, 2, 3, 1), normalise(images, MEAN, STD))
    assert torch.equal(targets, labels)


@pytest.mark.usefixtures("global_generators")
def test_draws_are_a_function_of_their_seed(images):
    config = AugmentConfig(crop_pad_px=4, flip="random", cutout_px=8, mixup_alpha=0.2)
    first, same, other = (draws_of(config, images, step=step) for step in (1, 1, 2))
    for name in ("crop_yx", "is_flipped", "cutout_yx", "mix_share", "mix_partner"):
        assert np.array_equal(getattr(first, name), getattr(same, name))
        assert not np.array_equal(getattr(first, name), getattr(other, name))


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ConfigError, match="augment.cutout_px must be at most the image's 8 px"):
        check_augment(AugmentConfig(cutout_px=9), 8, 16)
    with pytest.raises(ConfigError, match="augment.crop_pad_px must be below the image's 8 px"):
        check_augment(AugmentConfig(crop_pad_px=8, crop_pad_mode="reflect"), 16, 8)
    check_augment(AugmentConfig(cutout_px=8, crop_pad_px=9), 8, 8)
    check_augment(AugmentConfig(crop_pad_px=7, crop_pad_mode="reflect"), 8, 8)

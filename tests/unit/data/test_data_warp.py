"""Rotation, distortion, sizes and erasing of a batch, against torchvision and timm."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from torchvision.transforms import InterpolationMode, RandomErasing
from torchvision.transforms import functional as TF

from fieldmark.config import AugmentConfig
from fieldmark.data.augment import apply, check_augment, draw, generator
from fieldmark.data.erase import draw_erase_boxes, erase
from fieldmark.data.images import ArrayImages
from fieldmark.data.photo import train_pixels
from fieldmark.data.sizes import image_px_at, resize, scaled_px, size_at
from fieldmark.data.warp import CONTROL_POINTS, _surface, draw_angles, draw_shifts, warp
from fieldmark.errors import ConfigError

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


@pytest.fixture
def images(photos):
    pieces = [np.array(photos[index % 2].crop((150, 100, 198, 140))) for index in range(6)]
    return torch.from_numpy(np.stack(pieces))


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_rotations_equal_torchvisions(images, mode):
    angles = np.array([-75.0, -10.0, 0.0, 3.5, 30.0, 90.0], dtype=np.float32)
    turned = warp(images, angles, None, elastic_px=0, mode=mode)
    assert turned.dtype == torch.uint8
    assert turned.is_contiguous()
    for index, angle in enumerate(angles.tolist()):
        expected = TF.rotate(
            images[index].permute(2, 0, 1).float(), angle, InterpolationMode.BILINEAR
        )
        # Without what came from outside, which torchvision leaves black.
        covered = TF.rotate(torch.ones(1, 40, 48), angle, InterpolationMode.BILINEAR)[0] > 0.999
        difference = (turned[index].float() - expected.permute(1, 2, 0)).abs()
        inside = difference if mode == "zero" else difference[covered]
        assert inside.max() <= 0.51  # rounded
    assert torch.equal(turned[2], images[2])
    corner = warp(images[:1], angles[:1], None, elastic_px=0, mode=mode)[0, 0, 0]
    assert (corner == 0).all() == (mode == "zero")


def test_what_lies_outside_is_mirrored():
    stripe = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    stripe[:, :, 0] = 200
    shifts = np.zeros((1, 2, CONTROL_POINTS, CONTROL_POINTS), dtype=np.float32)
    shifts[:, 0] = -2.0 / 0.5  # every pixel looks two to the left; see the scale below
    scale = float(_surface(torch.ones(1, 2, CONTROL_POINTS, CONTROL_POINTS), (8, 8))[0, 0, 0, 0])
    moved = warp(stripe, None, shifts, elastic_px=0.5 / scale, mode="reflect")[0, 4, :, 0]
    # Column x shows column x - 2: 2 shows the stripe, 1 its mirror image, 0 what is beside it.
    assert moved.tolist() == [0, 200, 200, 0, 0, 0, 0, 0]


def test_shifts_have_the_root_mean_square_that_is_asked_for():
    shifts = torch.from_numpy(draw_shifts(generator("elastic"), 2_000))
    for size in ((32, 32), (40, 24)):
        surface = _surface(shifts, size)
        assert surface.shape == (2_000, 2, *size)
        assert abs(float(surface.square().mean().sqrt()) - 1) < 0.02
        # Smooth: neighbours move alike.
        steps = (surface[..., 1:] - surface[..., :-1]).square().mean().sqrt()
        assert float(steps) < 8 / size[1]


def test_a_distortion_follows_its_surface(images):
    shifts = draw_shifts(generator("follow"), 6)
    ours = warp(images, None, shifts, elastic_px=1.5, mode="reflect")
    surface = _surface(torch.from_numpy(shifts), (40, 48)) * 1.5
    from scipy.ndimage import map_coordinates

    rows, columns = np.mgrid[:40, :48].astype(float)
    for index in range(6):
        at = [rows + surface[index, 1].numpy(), columns + surface[index, 0].numpy()]
        for channel in range(3):
            plane = images[index, ..., channel].numpy().astype(float)
            expected = map_coordinates(plane, at, order=1, mode="reflect")
            assert np.abs(ours[index, ..., channel].numpy() - expected).max() < 0.6


def test_rotation_and_distortion_are_drawn_for_each_image(images):
    same = images[:1].expand(64, -1, -1, -1).contiguous()
    for config in (AugmentConfig(rotation_deg=20), AugmentConfig(elastic_px=1)):
        draws = draw(config, generator("each"), np.arange(64), 40, 48, seed=0, epoch=0)
        labels = torch.zeros(64, dtype=torch.int64)
        out, _ = apply(config, same, labels, draws, mean=MEAN, std=STD, num_classes=2)
        assert len({image.numpy().tobytes() for image in out.contiguous()}) == 64
    angles = draw_angles(generator("a"), 5_000, 20.0)
    assert stats.kstest(angles, stats.uniform(-20, 40).cdf).pvalue > 0.001


@pytest.mark.usefixtures("global_generators")
def test_a_file_is_rotated_and_distorted_as_a_batch_is(photos, spec):
    in_memory = ArrayImages(np.array(photos[0])[None], "train")
    config = AugmentConfig(rotation_deg=30, elastic_px=1.5, crop_pad_mode="reflect")
    ours = train_pixels(in_memory, 0, spec, config, generator("x"), is_flipped=False)
    rng = generator("x")
    angle, shifts = draw_angles(rng, 1, 30), draw_shifts(rng, 1)
    plain = torch.from_numpy(spec.to_pixels(photos[0]))[None]
    expected = warp(plain, angle, shifts, elastic_px=1.5, mode="reflect")
    assert np.array_equal(ours, expected[0].numpy())


def test_erased_boxes_have_the_distribution_of_torchvisions():
    torch.manual_seed(0)
    image = torch.zeros(3, 40, 48)
    theirs = []
    while len(theirs) < 3_000:
        top, left, height, width, _ = RandomErasing.get_params(
            image, scale=(0.02, 1 / 3), ratio=(0.3, 3.3), value=[0.0]
        )
        theirs.append((top, left, height, width))
    ours = draw_erase_boxes(generator("boxes"), 3_000, 1.0, 40, 48)
    for column in range(4):
        pair = [boxes[:, column] for boxes in (ours, np.array(theirs))]
        assert stats.ks_2samp(*pair).pvalue > 0.001
    assert (ours[:, 0] + ours[:, 2] <= 40).all()
    assert (ours[:, 1] + ours[:, 3] <= 48).all()
    some = draw_erase_boxes(generator("boxes"), 3_000, 0.25, 40, 48)
    assert abs((some[:, 2] > 0).mean() - 0.25) < 0.03


def test_erasing_replaces_the_box_and_nothing_else():
    boxes = np.array([[3, 4, 10, 20], [0, 0, 0, 0], [30, 28, 10, 20]])
    before = torch.rand(3, 40, 48, 3) + 5
    for rng in (None, generator("noise")):
        after = before.clone()
        erase(after, boxes, rng)
        assert torch.equal(after[1], before[1])
        values = []
        for index in (0, 2):
            top, left, height, width = boxes[index]
            kept = torch.ones(40, 48, dtype=torch.bool)
            kept[top : top + height, left : left + width] = False
            assert torch.equal(after[index][kept], before[index][kept])
            values.append(after[index][~kept].flatten())
        erased = torch.cat(values).numpy()
        assert len(erased) == 2 * 200 * 3
        if rng is None:
            assert (erased == 0).all()
        else:  # normal, for each pixel and channel
            assert stats.kstest(erased, stats.norm.cdf).pvalue > 0.001
            assert len(set(erased.tolist())) > 1_000


def test_resizing_equals_torchs_and_is_near_pillows(images):
    for size in ((20, 24), (52, 60)):
        ours = resize(images, size)
        assert ours.is_contiguous()
        expected = F.interpolate(
            images.permute(0, 3, 1, 2).float().contiguous(), size, mode="bilinear", antialias=True
        )
        torch.testing.assert_close(ours.permute(0, 3, 1, 2), expected, rtol=0, atol=1e-3)
        pillow = Image.fromarray(images[0].numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
        assert (ours[0] - torch.from_numpy(np.array(pillow)).float()).abs().max() < 1.1


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 24), (2, 24), (3, 32), (14, 32), (15, 48), (29, 48)]
)
def test_sizes_hold_from_their_fraction_of_the_run(step, expected):
    assert image_px_at(((0.0, 24), (0.1, 32), (0.5, 48)), step, 30, 64) == expected


def test_without_sizes_an_image_stays_as_it_is():
    assert image_px_at((), 7, 30, 64) == 64
    assert size_at(None, 40, 48) == (40, 48)
    assert size_at(40, 40, 48) == (40, 48)
    assert size_at(20, 40, 48) == (20, 24)
    assert size_at(60, 48, 40) == (72, 60)
    assert scaled_px(12, (16, 16), (32, 32)) == 6
    assert scaled_px(12, (32, 32), (32, 32)) == 12
    assert scaled_px(1, (8, 8), (32, 32)) == 1
    assert scaled_px(0, (8, 8), (32, 32)) == 0


def test_lengths_scale_with_the_size(images):
    config = AugmentConfig(cutout_px=10)
    small = (20, 24)
    draws = draw(config, generator(0), np.arange(6), 40, 48, seed=0, epoch=0, size=small)
    labels = torch.arange(6)
    out, _ = apply(config, images, labels, draws, mean=MEAN, std=STD, num_classes=6, size=small)
    assert out.shape == (6, 3, 20, 24)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert ((out == 0).all(dim=1).sum(dim=(1, 2)) == 5 * 5).all()


def test_what_does_not_fit_is_an_error():
    check_augment(AugmentConfig(elastic_px=4, sizes=((0.0, 8), (0.5, 128))), 32, 40)
    with pytest.raises(ConfigError, match="augment.elastic_px must be at most 4, an eighth"):
        check_augment(AugmentConfig(elastic_px=4.1), 32, 40)
    for px in (7, 129):
        with pytest.raises(ConfigError, match=f"from 8 px to 128 px, .* Got {px}"):
            check_augment(AugmentConfig(sizes=((0.0, px),)), 32, 40)

import numpy as np
import pytest
import torch
from scipy import stats

from fieldmark.config import AugmentConfig
from fieldmark.data.augment import generator, normalise
from fieldmark.data.mixing import _draw_kind, cut_mix, draw_cutmix_boxes, draw_mix, mix_up

CUTMIX = AugmentConfig(cutmix_alpha=1.0)
BOTH = AugmentConfig(mixup_alpha=0.4, cutmix_alpha=1.0)


def mixed(config, count, *, step=0, num_parts=1, height=24, width=32):
    rng = generator("mix", step)
    return draw_mix(config, rng, count, height, width, seed=3, step=step, num_parts=num_parts)


@pytest.fixture
def batch(photos):
    rng = np.random.default_rng(0)
    pieces = []
    for index in range(40):
        left, top = int(rng.integers(0, 600)), int(rng.integers(0, 390))
        pieces.append(np.array(photos[index % 2].crop((left, top, left + 32, top + 24))))
    pixels = torch.from_numpy(np.stack(pieces))
    return normalise(pixels, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)), torch.arange(40) % 7


def test_cutmix_takes_a_box_and_its_share_of_the_label(batch):
    x_BHWC, labels = batch
    how = mixed(CUTMIX, 40)
    out, targets = cut_mix(x_BHWC, labels, how.share, how.partner, how.boxes, 7)
    assert sorted(how.partner) == list(range(40))
    areas = set()
    for index in range(40):
        partner = int(how.partner[index])
        top, left, height, width = (int(value) for value in how.boxes[index])
        expected = x_BHWC[index].clone()
        expected[top : top + height, left : left + width] = x_BHWC[
            partner, top : top + height, left : left + width
        ]
        assert torch.equal(out[index], expected)
        taken = height * width / (24 * 32)
        row = np.zeros(7)
        row[labels[index]] += 1 - taken
        row[labels[partner]] += taken
        assert np.allclose(targets[index].numpy(), row, atol=1e-6)
        areas.add(taken)
    assert len(areas) > 20  # each image has a box of its own


def test_boxes_have_the_distribution_of_timms():
    from timm.data.mixup import rand_bbox

    np.random.seed(0)
    shares = generator("shares").beta(1.0, 1.0, 3_000).astype(np.float32)
    ours = draw_cutmix_boxes(shares, generator("boxes"), 40, 48)
    theirs = []
    for share in shares:
        top, bottom, left, right = rand_bbox((1, 3, 40, 48), float(share))
        theirs.append((top, left, bottom - top, right - left))
    for column in range(4):
        pair = [boxes[:, column] for boxes in (ours, np.array(theirs))]
        assert stats.ks_2samp(*pair).pvalue > 0.001
    assert (ours >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= 40).all()
    assert (ours[:, 1] + ours[:, 3] <= 48).all()


def test_updates_are_mixed_as_often_as_they_should():
    config = BOTH.model_copy(update={"mix_prob": 0.6, "cutmix_prob": 0.25})
    kinds = [_draw_kind(config, 3, step) for step in range(4_000)]
    share = {kind: kinds.count(kind) / 4_000 for kind in ("none", "mixup", "cutmix")}
    assert abs(share["none"] - 0.4) < 0.03
    assert abs(share["mixup"] - 0.6 * 0.75) < 0.03
    assert abs(share["cutmix"] - 0.6 * 0.25) < 0.03
    assert {_draw_kind(CUTMIX, 3, step) for step in range(50)} == {"cutmix"}
    only_mixup = AugmentConfig(mixup_alpha=0.1, cutmix_prob=1.0)
    assert {_draw_kind(only_mixup, 3, step) for step in range(50)} == {"mixup"}
    assert kinds != [_draw_kind(config, 4, step) for step in range(4_000)]


def test_an_update_that_is_not_mixed_has_soft_targets_all_the_same(batch):
    x_BHWC, labels = batch
    config = AugmentConfig(mixup_alpha=0.4, mix_prob=1e-9)
    how = mixed(config, 40, num_parts=4)
    assert how.boxes is None
    part = slice(10, 20)
    out, targets = mix_up(x_BHWC[part], labels[part], how.share[part], how.partner[part], 7)
    assert torch.equal(out, x_BHWC[part])
    assert torch.equal(targets, torch.eye(7)[labels[part]])


def test_without_mixing_nothing_is_drawn():
    for config in (AugmentConfig(), AugmentConfig(mixup_alpha=1.0, mix_prob=0)):
        rng = generator("same")
        how = draw_mix(config, rng, 8, 24, 32, seed=0, step=0)
        assert how == (None, None, None)
        assert rng.random() == generator("same").random()


@pytest.mark.parametrize("config", [BOTH, CUTMIX, AugmentConfig(mixup_alpha=1.0)])
def test_partners_are_of_the_same_micro_batch(config):
    how = mixed(config, 48, num_parts=4)
    orders = how.partner.reshape(4, 12)
    for order in orders:
        assert sorted(order) == list(range(12))
    assert len({tuple(order) for order in orders}) == 4
    assert len(how.share) == 48

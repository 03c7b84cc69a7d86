"""predictor.py: bytes and pixels to ranked classes, and the opening of a package."""

import dataclasses
import time

import numpy as np
import pytest
from PIL import Image

from fieldmark.errors import (
    BodyTooLarge,
    CheckFailed,
    ImageError,
    ImageTooLarge,
    ModelError,
    PackageError,
    UnknownName,
)
from fieldmark.serving import predictor as predictor_module
from fieldmark.serving.predictor import open_predictor, unless_slower


def gives(*rows):
    """A model that answers with these logits, whatever it is shown."""
    return lambda pixels: np.array(rows, dtype=np.float32)


def pixels(count=1):
    return np.zeros((count, 16, 16, 3), dtype=np.uint8)


def test_ranks_each_image_by_probability(make_predictor):
    predictor = make_predictor(gives([1.0, 3.0, 2.0], [5.0, 0.0, 0.0]))
    first, second = predictor.classify_pixels(pixels(2))
    assert [prediction.class_name for prediction in first] == ["green", "blue", "red"]
    assert [prediction.description for prediction in first] == ["mostly green", "", "mostly red"]
    assert second[0].class_name == "red"
    # The formula in float64, to its last digits: float32 would be off by 1e-8.
    expected = np.exp([3.0, 2.0, 1.0]) / np.exp([3.0, 2.0, 1.0]).sum()
    got = [prediction.probability for prediction in first]
    assert got == pytest.approx(expected.tolist(), abs=1e-15)
    assert all(type(value) is float for value in got)
    assert sum(got) == pytest.approx(1.0, abs=1e-15)


def test_equal_logits_keep_the_order_of_classes(make_predictor):
    [ranked] = make_predictor(gives([1.0, 2.0, 2.0])).classify_pixels(pixels())
    assert [prediction.class_name for prediction in ranked] == ["green", "blue", "red"]
    [ranked] = make_predictor(gives([0.0, 0.0, 0.0])).classify_pixels(pixels())
    assert [prediction.class_name for prediction in ranked] == ["red", "green", "blue"]


def test_ranks_by_logit_where_probabilities_vanish(make_predictor):
    [ranked] = make_predictor(gives([-2000.0, -1000.0, 0.0])).classify_pixels(pixels())
    assert [prediction.class_name for prediction in ranked] == ["blue", "green", "red"]
    assert [prediction.probability for prediction in ranked] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("temperature", [0.25, 1.0, 5.0])
def test_a_temperature_divides_the_logits_and_ranks_no_other_class(make_predictor, temperature):
    predictor = dataclasses.replace(
        make_predictor(gives([-900.0, 3.0, 2.0])), temperature=temperature
    )
    [ranked] = predictor.classify_pixels(pixels())
    assert [prediction.class_name for prediction in ranked] == ["green", "blue", "red"]
    expected = 1 / (1 + np.exp(-1 / temperature))
    assert ranked[0].probability == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("top_k", "expected"), [(None, 3), (1, 1), (2, 2), (3, 3), (9, 3)])
def test_top_k(make_predictor, top_k, expected):
    [ranked] = make_predictor(gives([1.0, 3.0, 2.0])).classify_pixels(pixels(), top_k)
    assert len(ranked) == expected
    assert ranked[0].class_name == "green"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_model_that_is_not_finite_is_an_error_not_an_answer(make_predictor, bad):
    predictor = make_predictor(gives([1.0, bad, 2.0]))
    with pytest.raises(ModelError, match=r"must be finite.*fieldmark verify"):
        predictor.classify_pixels(pixels())


def test_a_model_of_another_shape_is_an_error(make_predictor):
    predictor = make_predictor(gives([1.0, 2.0]))
    with pytest.raises(ModelError, match=r"shape \(1, 3\). Got \(1, 2\)"):
        predictor.classify_pixels(pixels())


def test_decode_is_the_package_preprocessing_with_caps(make_predictor, encode):
    predictor = make_predictor()
    encoded = encode("red")
    assert np.array_equal(predictor.decode(encoded), predictor.preprocess(encoded))
    with pytest.raises(BodyTooLarge):
        predictor.decode(encoded, max_bytes=len(encoded) - 1)
    with pytest.raises(ImageTooLarge):
        predictor.decode(encoded, max_pixels=24 * 20 - 1)
    with pytest.raises(ImageError, match="one of JPEG. Got"):
        predictor.decode(encoded, formats=("JPEG",))


def test_open_predictor(tiny_package, make_predictor, encode):
    predictor = open_predictor(tiny_package)
    assert predictor.class_names == ("red", "green", "blue")
    assert predictor.class_descriptions == ("mostly red", "mostly green", "")
    assert len(predictor.model_id) == 64
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    for encoded in (encode("lime"), encode(Image.fromarray(noise))):
        batch = predictor.decode(encoded)[None]
        [got], [expected] = (
            predictor.classify_pixels(batch),
            make_predictor().classify_pixels(batch),
        )
        assert [item.class_name for item in got] == [item.class_name for item in expected]
        assert [item.probability for item in got] == pytest.approx(
            [item.probability for item in expected], abs=1e-5
        )


def test_open_predictor_measures_the_golden_samples(write_tiny_package):
    def shift(samples):
        return dataclasses.replace(samples, logits=samples.logits + np.float32([0, 0.5, 0]))

    folder = write_tiny_package(change=shift)
    with pytest.raises(
        CheckFailed, match=r"repeat its golden samples.* Got 0\.5\. Run: "
    ) as caught:
        open_predictor(folder)
    assert "\n" not in str(caught.value)
    assert open_predictor(folder, check=False).num_classes == 3


def test_open_predictor_checks_decoding_too(write_tiny_package):
    def darken(samples):
        return dataclasses.replace(samples, encoded=samples.encoded[::-1])

    with pytest.raises(CheckFailed, match="decode to the recorded pixels"):
        open_predictor(write_tiny_package(change=darken))


def test_open_predictor_says_that_nothing_was_checked(write_tiny_package, capsys):
    folder = write_tiny_package(with_golden=False)
    assert open_predictor(folder).num_classes == 3
    assert "no golden samples" in capsys.readouterr().err
    open_predictor(folder, check=False)
    assert capsys.readouterr().err == ""


def test_open_predictor_refuses_what_is_not_there(tiny_package, tmp_path):
    with pytest.raises(PackageError, match="must be a package"):
        open_predictor(tmp_path)
    with pytest.raises(UnknownName, match="'onxx' does not exist. Did you mean 'onnx'"):
        open_predictor(tiny_package, variant="onxx")


def test_one_image_alone_has_the_threads_of_all_calls_if_that_is_faster(make_predictor):
    def takes(seconds):
        def predict(images):
            time.sleep(seconds)
            return np.full((len(images), 3), seconds, np.float32)

        return predict

    for alone_s, is_kept in ((0.001, True), (0.03, False)):
        one = dataclasses.replace(make_predictor(takes(0.02)), alone=takes(alone_s))
        found = unless_slower(one)
        assert (found.alone is not None) == is_kept
        np.testing.assert_array_equal(
            found.logits_alone(pixels()), np.full((1, 3), alone_s if is_kept else 0.02, np.float32)
        )
        np.testing.assert_array_equal(found.logits(pixels()), np.full((1, 3), 0.02, np.float32))
    nan = dataclasses.replace(make_predictor(), alone=lambda images: np.full((1, 3), np.nan))
    with pytest.raises(ModelError, match="finite"):
        nan.logits_alone(pixels())


def test_what_one_image_alone_goes_through_gives_the_same_and_is_checked(tiny_package, monkeypatch):
    draw = np.random.default_rng(0)
    found = open_predictor(tiny_package, threads=1, workers=2, serves=True)
    shape = (1, found.preprocess.height_px, found.preprocess.width_px, 3)
    image = draw.integers(0, 256, shape, dtype=np.uint8)
    assert found.alone is not None
    np.testing.assert_array_equal(found.logits_alone(image), found.logits(image))
    for usual in ({"workers": 1, "serves": True}, {"workers": 2}):
        assert open_predictor(tiny_package, threads=1, **usual).alone is None
    opened = predictor_module.open_served

    def open_other(package, variant, threads, *rest, **named):
        right = opened(package, variant, threads, *rest, **named)
        return right if threads == 1 else lambda images: right(images) + np.float32(1)

    monkeypatch.setattr(predictor_module, "open_served", open_other)
    assert open_predictor(tiny_package, threads=1, workers=2).alone is None
    with pytest.raises(CheckFailed, match="must repeat its golden samples"):
        open_predictor(tiny_package, threads=1, workers=2, serves=True)

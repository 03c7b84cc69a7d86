"""Golden samples: what they catch, and that they catch nothing else."""

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from packaging_data import CLASS_NAMES, SPEC, Made, edit_manifest, put_file
from PIL import Image

import fieldmark.packaging.golden as golden_module
from fieldmark.errors import ImageError, ModelError, PackageError
from fieldmark.packaging.golden import check_golden, make_golden, read_golden, synthetic_images
from fieldmark.packaging.manifest import Package, open_package
from fieldmark.preprocess import Preprocess


def test_the_model_they_were_made_with_passes(package: Package, made: Made) -> None:
    check = check_golden(package, made.eager)
    assert check.passed
    assert check.problems() == []
    assert check.num_samples == 6
    assert check.max_level_difference == check.num_wrong_answers == 0
    assert check.max_abs_delta_logit is not None
    assert check.max_abs_delta_logit < 1e-5  # far below the tolerance
    assert 1e-3 < check.tolerance < 0.1


def test_they_read_back_as_made(package: Package, made: Made) -> None:
    golden = read_golden(package)
    assert golden.encoded == made.golden.encoded
    assert golden.pixels.dtype == np.uint8
    assert golden.logits.dtype == np.float32
    np.testing.assert_array_equal(
        golden.pixels, np.stack([SPEC(data) for data in made.golden.encoded])
    )
    np.testing.assert_allclose(golden.logits, made.eager(golden.pixels), atol=1e-5)
    assert [answer.class_name for answer in golden.answers] == [
        CLASS_NAMES[k] for k in golden.logits.argmax(axis=1)
    ]
    assert len({answer.class_name for answer in golden.answers}) > 1
    assert all(0.2 <= answer.probability <= 1 for answer in golden.answers)


def test_a_wider_crop_is_caught(folder: Path, made: Made) -> None:
    wider = SPEC.model_dump(mode="json") | {"crop_frac": 1.0}
    edit_manifest(folder, preprocess=wider)
    check = check_golden(open_package(folder), made.eager)
    assert check.max_level_difference > 2
    assert not check.passed


def test_swapped_channels_in_preprocessing_are_caught(
    package: Package, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    upright = Preprocess.to_pixels
    monkeypatch.setattr(
        Preprocess, "to_pixels", lambda self, image: upright(self, image)[..., ::-1]
    )
    check = check_golden(package, made.eager)
    assert not check.passed
    assert "decode" in " ".join(check.problems())


def test_swapped_channels_in_the_model_are_caught(package: Package, made: Made) -> None:
    check = check_golden(package, lambda images: made.eager(images[..., ::-1]))
    assert check.max_level_difference == 0  # preprocessing is as it was
    assert check.max_abs_delta_logit is not None
    assert check.max_abs_delta_logit > check.tolerance
    assert not check.passed


def test_class_names_in_another_order_are_caught(folder: Path, made: Made) -> None:
    shifted = [{"name": name} for name in (*CLASS_NAMES[1:], CLASS_NAMES[0])]
    edit_manifest(folder, classes=shifted)
    check = check_golden(open_package(folder), made.eager)
    assert check.max_abs_delta_logit is not None
    assert check.max_abs_delta_logit < check.tolerance  # logits alone would not tell
    assert check.num_wrong_answers == 6
    assert not check.passed


def test_outputs_in_another_order_are_caught(package: Package, made: Made) -> None:
    assert not check_golden(package, lambda images: np.roll(made.eager(images), 1, axis=1)).passed


def test_a_model_whose_batch_mates_matter_is_caught(package: Package, made: Made) -> None:
    def coupled(images: np.ndarray) -> np.ndarray:
        logits = made.eager(images)
        return logits if len(images) > 1 else logits + 1

    assert not check_golden(package, coupled).passed


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_caught(package: Package, made: Made, bad: float) -> None:
    check = check_golden(package, lambda images: np.full_like(made.eager(images), bad))
    assert check.max_abs_delta_logit is None
    assert not check.passed


def test_another_number_of_logits_is_caught(package: Package, made: Made) -> None:
    check = check_golden(package, lambda images: made.eager(images)[:, :4])
    assert check.max_abs_delta_logit is None
    assert not check.passed


@pytest.mark.parametrize(
    ("version", "levels", "passes"),
    [("same", 0, True), ("same", 1, False), ("0.0.1", 2, True), ("0.0.1", 3, False)],
)
def test_levels_may_differ_only_when_pillow_does(
    folder: Path, made: Made, version: str, levels: int, passes: bool
) -> None:
    golden = read_golden(open_package(folder))
    pixels = golden.pixels.copy()
    pixels[0, 0, 0, 0] = np.uint8(
        pixels[0, 0, 0, 0] + (levels if pixels[0, 0, 0, 0] < 128 else -levels)
    )
    arrays = io.BytesIO()
    np.savez(arrays, pixels=pixels, logits=made.eager(pixels))
    put_file(folder, "golden/samples.npz", arrays.getvalue())
    if version != "same":
        answers = json.loads((folder / "golden/answers.json").read_text())
        answers["pillow_version"] = version
        put_file(folder, "golden/answers.json", json.dumps(answers).encode())
    check = check_golden(open_package(folder), made.eager)
    assert check.max_level_difference == levels
    assert check.passed is passes


def test_a_format_this_pillow_lacks_is_caught(
    package: Package, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(self: Preprocess, encoded: bytes) -> np.ndarray:
        raise ImageError("image must be one of PNG.")

    monkeypatch.setattr(Preprocess, "__call__", cannot)
    check = check_golden(package, made.eager)
    assert check.max_level_difference == 255
    assert not check.passed


class _Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_the_arrays_is_not_run(folder: Path, made: Made, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    arrays = io.BytesIO()
    trap = np.array([_Trap(sprung)], dtype=object)
    np.savez(arrays, pixels=trap, logits=np.zeros((6, 5), np.float32))
    put_file(folder, "golden/samples.npz", arrays.getvalue())
    with pytest.raises(PackageError, match="golden samples"):
        check_golden(open_package(folder), made.eager)
    assert not sprung.exists()
    np.load(io.BytesIO(arrays.getvalue()), allow_pickle=True)["pixels"]
    assert sprung.exists()  # the trap does work


def test_arrays_that_unpack_to_more_are_refused(folder: Path) -> None:
    bomb = io.BytesIO()
    np.savez_compressed(
        bomb, pixels=np.zeros((6, 32, 32, 3), np.uint8), logits=np.zeros((6, 500_000), np.float32)
    )
    assert len(bomb.getvalue()) < 100_000
    put_file(folder, "golden/samples.npz", bomb.getvalue())
    with pytest.raises(PackageError, match="unpacks to"):
        read_golden(open_package(folder))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 not a zip", b"\x93NUMPY"])
def test_arrays_that_are_no_archive_are_refused(folder: Path, data: bytes) -> None:
    put_file(folder, "golden/samples.npz", data)
    with pytest.raises(PackageError, match="golden samples"):
        read_golden(open_package(folder))


@pytest.mark.parametrize(
    "answers",
    [
        {},
        {"pillow_version": "1", "samples": [{"file": 3}]},
        {"pillow_version": "1", "samples": []},
        [],
    ],
)
def test_answers_that_do_not_fit_are_refused(folder: Path, answers: object) -> None:
    put_file(folder, "golden/answers.json", json.dumps(answers).encode())
    with pytest.raises(PackageError):
        read_golden(open_package(folder))


def test_original_bytes_are_kept_under_their_format(made: Made) -> None:
    jpeg, webp = io.BytesIO(), io.BytesIO()
    with Image.open(io.BytesIO(made.golden.encoded[0])) as image:
        image.save(jpeg, format="JPEG")
        image.save(webp, format="WEBP")
    encoded = [jpeg.getvalue(), made.golden.encoded[1], webp.getvalue()]
    files = make_golden(encoded, SPEC, made.eager, CLASS_NAMES).files()
    assert [files[f"golden/00{name}"] for name in ("0.jpg", "1.png", "2.webp")] == encoded


def test_the_same_samples_give_the_same_files(made: Made) -> None:
    first, second = (
        make_golden(made.golden.encoded, SPEC, made.eager, CLASS_NAMES).files() for _ in range(2)
    )
    assert first == second
    with zipfile.ZipFile(io.BytesIO(first["golden/samples.npz"])) as archive:
        assert sorted(archive.namelist()) == ["logits.npy", "pixels.npy"]


def test_a_model_that_gives_nonsense_makes_no_golden_samples(made: Made) -> None:
    with pytest.raises(ModelError, match="not finite"):
        make_golden(
            made.golden.encoded,
            SPEC,
            lambda x: np.full((len(x), 5), np.nan, np.float32),
            CLASS_NAMES,
        )
    with pytest.raises(ModelError, match=r"of shape \(6, 4\)"):
        make_golden(made.golden.encoded, SPEC, made.eager, CLASS_NAMES[:4])


def test_synthetic_images_are_the_same_each_time_and_differ_from_each_other() -> None:
    images = synthetic_images(8, seed=0)
    assert images == synthetic_images(8, seed=0)
    assert images[:3] == synthetic_images(3, seed=0)
    assert len(set(images)) == 8
    assert not set(images) & set(synthetic_images(8, seed=1))
    sizes = []
    for data in images:
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.mode) == ("PNG", "RGB")
            assert np.asarray(image).std() > 10
            sizes.append(image.size)
    assert len(set(sizes)) == 8
    assert any(width > height for width, height in sizes)
    assert any(width < height for width, height in sizes)


def test_no_samples_never_pass(folder: Path, made: Made) -> None:
    edit_manifest(folder, golden={"kind": "none", "count": 0})
    check = check_golden(open_package(folder), made.eager)
    assert not check.passed
    assert check.problems() == ["The package has no golden samples."]
    with pytest.raises(PackageError, match="has none"):
        read_golden(open_package(folder))


def test_limit_is_the_documented_one() -> None:
    assert golden_module.LEVELS_ACROSS_PILLOW_VERSIONS == 2

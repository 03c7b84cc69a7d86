import pickle
import urllib.error

import numpy as np
import pytest
import torchvision
from sklearn.datasets import load_digits

from fieldmark.data.images import ArrayImages, Selection, prepare
from fieldmark.data.labelled import Split, fingerprint
from fieldmark.data.source import KINDS, open_source
from fieldmark.errors import DataError, UnknownName
from fieldmark.preprocess import decode


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("cifar01", "Did you mean 'cifar10'?"),
        ("folders:x", "Did you mean 'folder'?"),
        ("cifar10:x", "Kinds: "),
        ("", "Kinds: "),
        ("/tmp", "Did you mean 'folder:/tmp'?"),
    ],
)
def test_unknown_source_names_the_kinds(spec, hint):
    with pytest.raises(UnknownName) as caught:
        open_source(spec)
    assert hint in str(caught.value)
    assert all(kind in str(caught.value) for kind in KINDS)


@pytest.mark.parametrize("kind", ["folder", "imagenet"])
def test_a_path_that_does_not_exist_names_the_nearest(kind, tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"does not exist. Did you mean 'photos'\?"):
        open_source(f"{kind}:{tmp_path}/photo")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="must be a folder of images. Got a file"):
        open_source(f"{kind}:{tmp_path}/file")


@pytest.mark.parametrize("spec", ["folder:", "imagenet:", "hf:", "folder", "hf"])
def test_a_kind_without_its_path_says_what_is_missing(spec):
    with pytest.raises(DataError, match=r"(PATH|NAME_OR_PATH)\. Got"):
        open_source(spec)


def test_digits_are_all_of_scikit_learns_as_rgb():
    source = open_source("digits")
    original = load_digits()
    split = source.splits["all"]
    assert list(source.splits) == ["all"]
    assert source.class_names == tuple("0123456789")
    assert len(split) == 1797
    assert np.array_equal(split.labels, original.target)
    pixels = np.asarray(split.images.image(5))
    assert pixels.shape == (32, 32, 3)  # enlarged from 8 x 8, so that small networks take them
    shrunk = pixels[..., 0].reshape(8, 4, 8, 4).mean((1, 3))
    correlation = np.corrcoef(shrunk.ravel(), original.images[5].ravel())[0, 1]
    assert correlation > 0.97
    assert np.array_equal(pixels[..., 0], pixels[..., 2])
    assert source.fingerprint == open_source("digits").fingerprint


def test_array_images_encode_without_loss(spec):
    images = open_source("digits").splits["all"].images
    assert images.name(7) == "all[7]"
    assert np.array_equal(np.asarray(decode(images.encoded(7))), np.asarray(images.image(7)))
    # The short way and the way through the encoded bytes are one preprocessing.
    assert np.array_equal(prepare(images, 7, spec), spec(images.encoded(7)))


def test_everything_counts_in_a_fingerprint():
    images = open_source("digits").splits["all"].images

    def of(names=("a", "b"), split="train", labels=(0, 1), content=(b"xy", b"z")):
        part = Split(split, images, np.array(labels))
        return fingerprint(names, [(part, content)])

    prints = {
        of(),
        of(names=("b", "a")),
        of(names=("ab",)),
        of(split="test"),
        of(labels=(1, 0)),
        of(content=(b"x", b"yz")),
        of(content=(b"xy", b"w")),
    }
    assert len(prints) == 7
    assert of() == of()


def test_a_subset_of_a_subset_keeps_names_and_labels():
    whole = open_source("digits").splits["all"]
    part = whole.subset(np.array([10, 20, 30, 40]), "part").subset(np.array([3, 1]), "less")
    assert (part.name, len(part), len(part.images)) == ("less", 2, 2)
    assert part.images.name(0) == "all[40]"
    assert part.images.encoded(1) == whole.images.encoded(20)
    assert list(part.labels) == [whole.labels[40], whole.labels[20]]
    assert isinstance(part.images, Selection)
    assert isinstance(part.images.base, ArrayImages)  # one step, however often it is cut


@pytest.fixture
def cifar_files(tmp_path, monkeypatch):
    """Write CIFAR's own files, with other images, where the source looks for them."""
    monkeypatch.setenv("FIELDMARK_DATA", str(tmp_path))
    rng = np.random.default_rng(0)

    def write(folder, files, label_key, meta):
        (tmp_path / folder).mkdir()
        for name, count in files.items():
            content = {
                "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
                label_key: [index % 10 for index in range(count)],
            }
            (tmp_path / folder / name).write_bytes(pickle.dumps(content))
        for name, value in meta.items():
            (tmp_path / folder / name).write_bytes(pickle.dumps(value))

    # torchvision compares MD5 sums with those of the real files.
    monkeypatch.setattr(
        torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: _exists(path)
    )
    return write


def _exists(path):
    import os

    return os.path.exists(path)


def test_cifar10_is_read_from_its_own_files(cifar_files, tmp_path):
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship"]
    files = {f"data_batch_{index}": 20 for index in range(1, 6)} | {"test_batch": 20}
    meta = {"batches.meta": {"label_names": [*names, "truck"]}}
    cifar_files("cifar-10-batches-py", files, "labels", meta)
    source = open_source("cifar10")
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 100, "test": 20}
    assert source.class_names == (*names, "truck")
    stored = pickle.loads((tmp_path / "cifar-10-batches-py" / "data_batch_2").read_bytes())
    image_CHW = stored["data"][3].reshape(3, 32, 32)
    train = source.splits["train"]
    assert np.array_equal(np.asarray(train.images.image(23)), image_CHW.transpose(1, 2, 0))
    assert train.labels[23] == 3
    assert train.images.name(23) == "train[23]"


def test_cifar100_has_its_fine_classes(cifar_files):
    names = [f"fine {index}" for index in range(100)]
    meta = {"meta": {"fine_label_names": names}}
    cifar_files("cifar-100-python", {"train": 30, "test": 10}, "fine_labels", meta)
    assert open_source("cifar100").class_names == tuple(names)


def test_an_absent_data_set_without_a_network_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("FIELDMARK_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(DataError) as caught:
        open_source("cifar10")
    message = str(caught.value)
    assert str(tmp_path / "nothing") in message
    assert "no network" in message
    assert "cifar-10-python.tar.gz" in message
    assert "FIELDMARK_DATA" in message


def test_the_cache_folder_is_used_without_the_variable(monkeypatch):
    from fieldmark.data.source_arrays import data_root

    monkeypatch.delenv("FIELDMARK_DATA", raising=False)
    assert data_root().parts[-3:] == (".cache", "fieldmark", "data")

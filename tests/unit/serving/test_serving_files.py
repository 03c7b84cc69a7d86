"""files.py: a stream of files in order, in bounded memory, whatever some of them are."""

import csv
import io
import os
import threading
import time
import tracemalloc
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from fieldmark.errors import ConfigError, ModelError
from fieldmark.preprocess import MAX_BYTES, Preprocess
from fieldmark.serving import files
from fieldmark.serving.files import FileResult, classify_files, write_csv
from fieldmark.serving.predictor import Prediction


@pytest.fixture
def save(tmp_path, encode):
    """Write an image below tmp_path and return its path as text."""

    def save(name, colour="red", format="PNG"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(colour, format))
        return str(path)

    return save


def best(results):
    return [(r.file, r.error or r.predictions[0].class_name) for r in results]


def test_results_come_in_order_and_a_bad_file_does_not_stop_the_rest(
    save, make_predictor, tmp_path
):
    paths = [save("a.png", "red"), save("b.jpg", "blue", "JPEG"), save("c", "lime", "WEBP")]
    broken, missing = tmp_path / "broken.png", tmp_path / "missing.png"
    broken.write_bytes(b"no image")
    order = [paths[0], broken, paths[2], missing, paths[1], paths[0]]
    for batch_size in (1, 2, 32):
        results = list(classify_files(make_predictor(), order, batch_size=batch_size))
        assert [r.file for r in results] == list(map(str, order))
        assert [bool(r.error) for r in results] == [False, True, False, True, False, False]
        assert [r.predictions[0].class_name for r in results if not r.error] == [
            "red",
            "green",
            "blue",
            "red",
        ]
        assert results[1].error.startswith("image must be one of JPEG")
        assert results[3].error == "file must exist. It does not."
        assert results[1].predictions == ()


def test_only_bad_files(make_predictor):
    results = list(classify_files(make_predictor(), ["/none/1", "/none/2"]))
    assert [r.error for r in results] == ["file must exist. It does not."] * 2
    assert list(classify_files(make_predictor(), [])) == []


def test_top_k(save, make_predictor):
    path = save("a.png")
    assert len(next(classify_files(make_predictor(), [path], top_k=2)).predictions) == 2
    assert len(next(classify_files(make_predictor(), [path])).predictions) == 3


def test_batches_are_full_and_never_larger(save, make_predictor):
    paths = [save(f"{n}.png") for n in range(11)]
    sizes = []

    def predict(pixels):
        sizes.append(len(pixels))
        return np.zeros((len(pixels), 3), np.float32)

    assert len(list(classify_files(make_predictor(predict), paths, batch_size=4))) == 11
    assert sizes == [4, 4, 3]


def test_batching_does_not_change_answers(make_predictor, tmp_path):
    draw = np.random.default_rng(3)
    for n in range(9):
        size = (int(draw.integers(5, 60)), int(draw.integers(5, 60)), 3)
        Image.fromarray(draw.integers(0, 256, size, dtype=np.uint8)).save(tmp_path / f"{n}.png")
    one = list(classify_files(make_predictor(), [tmp_path], batch_size=1, threads=1))
    many = list(classify_files(make_predictor(), [tmp_path], batch_size=4, threads=4))
    assert one == many
    assert len({r.predictions[0].probability for r in one}) == 9


# --- what is found ---


def test_folders_are_searched_below_and_sorted(save, make_predictor, tmp_path):
    names = ["in/b/2.png", "in/b/1.JPG", "in/a.png", "in/c/d/e/deep.tiff", "in/b.webp"]
    for name in names:
        save(name, format="TIFF" if name.endswith("tiff") else "PNG")
    for name in ("in/notes.txt", "in/.hidden.png", "in/._a.png", "in/.git/x.png", "in/b/x.gif"):
        save(name)
    found = [r.file for r in classify_files(make_predictor(), [tmp_path / "in"])]
    expected = ["a.png", "b/1.JPG", "b/2.png", "b.webp", "c/d/e/deep.tiff"]
    assert found == [str(tmp_path / "in" / name) for name in expected]


def test_a_file_is_taken_by_its_content_whatever_its_name(save, make_predictor):
    path = save("photo.of.something", "blue", "JPEG")
    assert best(classify_files(make_predictor(), [path])) == [(path, "blue")]


def test_links_are_followed_but_not_in_circles(save, make_predictor, tmp_path):
    save("in/sub/a.png")
    save("other/b.png", "blue")
    (tmp_path / "in/sub/up").symlink_to(tmp_path / "in")
    (tmp_path / "in/elsewhere").symlink_to(tmp_path / "other")
    (tmp_path / "in/file.png").symlink_to(tmp_path / "other/b.png")
    (tmp_path / "in/nowhere.png").symlink_to(tmp_path / "gone.png")
    found = best(classify_files(make_predictor(), [tmp_path / "in"]))
    relative = [(os.path.relpath(file, tmp_path / "in"), answer) for file, answer in found]
    assert relative == [
        ("elsewhere/b.png", "blue"),
        ("file.png", "blue"),
        ("nowhere.png", "file must exist. It does not."),
        ("sub/a.png", "red"),
    ]


def test_folder_without_images(make_predictor, tmp_path):
    (tmp_path / "notes.txt").touch()
    [result] = classify_files(make_predictor(), [tmp_path])
    assert result.file == str(tmp_path)
    assert result.error.startswith("folder must hold images (.jpg")


def test_folder_that_cannot_be_read(save, make_predictor, tmp_path, monkeypatch):
    save("in/a/1.png")
    save("in/b/2.png")
    real = os.listdir

    def refuse(folder):
        if str(folder).endswith("a"):
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(files.os, "listdir", refuse)
    first, second = best(classify_files(make_predictor(), [tmp_path / "in"]))
    assert first == (str(tmp_path / "in/a"), "folder must be readable. Permission denied.")
    assert second[1] == "red"


def test_standard_input(make_predictor, encode, monkeypatch):
    class Stdin:
        buffer = io.BytesIO(encode("blue"))

    monkeypatch.setattr(files.sys, "stdin", Stdin)
    results = best(classify_files(make_predictor(), ["-", "-"], threads=1))
    assert results == [("-", "blue"), ("-", "image must not be empty. Got 0 bytes.")]


def test_pipes_and_devices_are_refused_rather_than_read_for_ever(make_predictor, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    paths = [tmp_path / "pipe.png", "/dev/zero"]
    results = list(classify_files(make_predictor(), paths))
    assert ["regular file" in r.error for r in results] == [True, True]


def test_file_that_is_too_large_is_not_read_whole(make_predictor, tmp_path):
    with (tmp_path / "big.png").open("wb") as file:
        file.truncate(50 * MAX_BYTES)
    tracemalloc.start()
    [result] = classify_files(make_predictor(), [tmp_path / "big.png"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"at most {MAX_BYTES} bytes" in result.error
    assert peak < 3 * MAX_BYTES


def test_file_that_vanishes_or_cannot_be_read(save, make_predictor, monkeypatch):
    path = save("a.png")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    [result] = classify_files(make_predictor(), [path])
    monkeypatch.undo()
    assert result.error == "file must be readable. Permission denied."


# --- bounded ---


class Counting(Preprocess):
    """Preprocessing that notes how many images are decoded and not yet consumed, at most."""

    def __call__(self, encoded, **caps):
        pixels = super().__call__(encoded, **caps)
        with LOCK:
            COUNT["decoded"] += 1
            COUNT["most"] = max(COUNT["most"], COUNT["decoded"] - COUNT["consumed"])
        return pixels


LOCK = threading.Lock()
COUNT = {}


@pytest.fixture
def counting(make_predictor):
    COUNT.update(decoded=0, consumed=0, most=0)
    return make_predictor(spec=Counting(height_px=16, width_px=16, mean=(0,) * 3, std=(1,) * 3))


def test_memory_does_not_grow_with_the_number_of_files(counting, encode, tmp_path):
    for n, colour in enumerate(("red", "lime", "blue")):
        (tmp_path / f"original{n}").write_bytes(encode(colour))
    for n in range(3000):
        folder = tmp_path / f"{n % 3}" / f"{n // 300}"
        folder.mkdir(parents=True, exist_ok=True)
        os.link(tmp_path / f"original{n % 3}", folder / f"{n:04}.png")
    answers = []
    for result in classify_files(counting, [tmp_path], batch_size=16):
        answers.append((result.file, result.predictions[0].class_name))
        COUNT["consumed"] += 1
    assert COUNT["decoded"] == len(answers) == 3000
    assert 16 <= COUNT["most"] <= 32
    assert [file for file, _ in answers] == sorted(file for file, _ in answers)
    for file, answer in answers:
        assert answer == ("red", "green", "blue")[int(os.path.relpath(file, tmp_path)[0])]


def test_the_next_batch_is_decoded_while_the_model_works(counting, save):
    paths = [save(f"{n}.png") for n in range(8)]
    decoded = []

    def predict(pixels):
        deadline = time.monotonic() + 5
        while COUNT["decoded"] < 8 and time.monotonic() < deadline:
            time.sleep(0.001)
        decoded.append(COUNT["decoded"])
        return np.zeros((len(pixels), 3), np.float32)

    object.__setattr__(counting, "predict", predict)
    assert len(list(classify_files(counting, paths, batch_size=4))) == 8
    assert decoded == [8, 8]


def test_paths_are_taken_only_as_far_as_needed(counting, save):
    path, taken = save("a.png"), 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield path

    stream = classify_files(counting, endless(), batch_size=8)
    for consumed, _ in enumerate(islice(stream, 100), start=1):
        assert taken - consumed < 16
    stream.close()
    assert COUNT["decoded"] <= taken < 130
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("decode")]


def test_folders_are_listed_only_as_far_as_needed(counting, save, tmp_path, monkeypatch):
    for n in range(60):
        save(f"in/{n:02}/a.png")
    listed = []
    real = os.listdir
    monkeypatch.setattr(files.os, "listdir", lambda folder: listed.append(folder) or real(folder))
    stream = classify_files(counting, [tmp_path / "in"], batch_size=4)
    next(stream)
    assert len(listed) <= 10
    stream.close()


def test_a_failing_model_is_raised_and_ends_the_threads(save, make_predictor):
    paths = [save(f"{n}.png") for n in range(8)]
    predictor = make_predictor(lambda pixels: np.full((len(pixels), 3), np.nan, np.float32))
    with pytest.raises(ModelError, match="finite"):
        list(classify_files(predictor, paths, batch_size=2))
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("decode")]


# --- CSV ---

RESULTS = [
    FileResult("a.png", (Prediction("red", 0.75), Prediction("blue", 0.125))),
    FileResult('odd, "name"\n.png', error="image must not be empty. Got 0 bytes."),
    FileResult("c.png", (Prediction("blue, dark", 1 / 3),)),
]


def test_csv(tmp_path):
    path = tmp_path / "out.csv"
    assert write_csv(iter(RESULTS), path, top_k=2) == (3, 1)
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["file", "class_1", "probability_1", "class_2", "probability_2", "error"],
        ["a.png", "red", "0.75", "blue", "0.125", ""],
        ['odd, "name"\n.png', "", "", "", "", "image must not be empty. Got 0 bytes."],
        ["c.png", "blue, dark", repr(1 / 3), "", "", ""],
    ]
    assert os.listdir(tmp_path) == ["out.csv"]


def test_csv_columns_do_not_depend_on_how_many_classes_a_result_has(tmp_path):
    write_csv(RESULTS, tmp_path / "out.csv", top_k=1)
    first, second, *_ = (tmp_path / "out.csv").read_text().splitlines()
    assert (first, second) == ("file,class_1,probability_1,error", "a.png,red,0.75,")


def test_csv_is_written_as_results_come(tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("old")
    sizes = []

    def many():
        for n in range(5000):
            if n % 1000 == 0:
                [temporary] = set(os.listdir(tmp_path)) - {"out.csv"}
                sizes.append((tmp_path / temporary).stat().st_size)
                assert path.read_text() == "old"
            yield FileResult(f"{n}.png", (Prediction("red", 0.5),))

    assert write_csv(many(), path, top_k=1) == (5000, 0)
    assert sizes == sorted(set(sizes))
    assert len(path.read_text().splitlines()) == 5001


def test_csv_that_fails_half_way_leaves_the_old_one(tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("old")

    def fail():
        yield RESULTS[0]
        raise ModelError("the model failed.")

    with pytest.raises(ModelError):
        write_csv(fail(), path, top_k=1)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.csv"]


def test_csv_keeps_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    write_csv([FileResult(name, error="x")], tmp_path / "out.csv", top_k=1)
    assert b"caf\xe9.png" in (tmp_path / "out.csv").read_bytes()


def test_csv_into_a_folder_that_does_not_exist(tmp_path):
    taken = []
    with pytest.raises(ConfigError, match="out.csv must be writable. No such file"):
        write_csv((taken.append(r) or r for r in RESULTS), tmp_path / "no/out.csv", top_k=1)
    assert not taken

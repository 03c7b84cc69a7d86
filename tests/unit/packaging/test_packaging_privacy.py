"""Paths of this machine are reduced to their last parts, and nothing else is touched."""

from typing import Any

import pytest

from fieldmark.packaging.privacy import shorten_paths


def shorten(text: str, **more: Any) -> tuple[str, list[str]]:
    content, shortened = shorten_paths({"training": {"text": text}, **more})
    return content["training"]["text"], shortened


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("folder:/home/me/photos", "folder:photos"),
        ("folder:/home/me/my photos/", "folder:my photos"),
        ("folder:../clients/acme", "folder:acme"),
        ("imagenet:/data/imagenet", "imagenet:imagenet"),
        ("local-dir:~/weights/one", "local-dir:one"),
        ("hf:/home/me/parquet", "hf:parquet"),
        ("/home/me/weights.pth", "weights.pth"),
        ("500 images of folder:/home/me/photos, val", "500 images of folder:photos, val"),
        ("read from file:///home/me/x.bin today", "read from file:x.bin today"),
        ("trained (from '/home/me/x')", "trained (from 'x')"),
        ("at ~/a/b and /c/d/e", "at b and e"),
    ],
)
def test_a_path_becomes_its_last_part(text: str, expected: str) -> None:
    assert shorten(text) == (expected, [text])


@pytest.mark.parametrize(
    "text",
    [
        "cifar10",
        "hf:owner/name",
        "https://example.org/a/b/c",
        "s3://bucket/a/b",
        "timm:resnet50.a1_in1k",
        "trained by fieldmark 0.1.0",
        "and/or, 3/4, n / a, km/h/s",
        "folder:photos",
        "",
    ],
)
def test_what_is_no_path_stays(text: str) -> None:
    assert shorten(text) == (text, [])


def test_a_path_with_spaces_is_found_in_a_sentence_by_what_else_names_it() -> None:
    content, shortened = shorten_paths(
        {
            "training": {"source": "folder:/home/me/my photos"},
            "variants": {
                "onnx": {"parity": {"data": "9 images of folder:/home/me/my photos, val"}}
            },
        }
    )
    assert content["variants"]["onnx"]["parity"]["data"] == "9 images of folder:my photos, val"
    assert shortened == ["folder:/home/me/my photos"]


def test_class_names_files_and_keys_stay() -> None:
    kept = {
        "classes": [{"name": "/usr/share/cat"}],
        "files": {"golden/000.png": {"sha256": "/a/b/c"}},
        "variants": {"onnx": {"file": "/not/a/path/here"}},
        "metrics": {"/a/b/c": {"value": 1.0, "none": None}},
    }
    content, shortened = shorten_paths({"training": None, **kept})
    assert content == {"training": None, **kept}
    assert shortened == []

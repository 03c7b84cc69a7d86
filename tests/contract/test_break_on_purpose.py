"""`verify` notices each thing that goes wrong with packages in practice."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are in the repository alone", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

from break_on_purpose import BREAKS, broken, verified  # noqa: E402  found by the line above

ASKED = {"max_images": 32}
SENTENCES = {
    "two channels swapped in preprocessing": "Golden images must decode to the recorded pixels",
    "labels shifted by one": "Golden samples must be given the recorded classes",
    "one weight altered, checksums made to fit": "Golden logits must be within",
    "one byte of the weights altered": "must match its SHA-256 in the manifest. It was altered",
    "a file truncated": "so it is truncated or altered",
    "a wider crop": "Golden images must decode to the recorded pixels",
}


def test_the_sound_package_passes(tiny_package: Path) -> None:
    assert verified(tiny_package, ASKED) == {"passed": True, "sentences": []}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_one_does_not(name: str, tiny_package: Path) -> None:
    with broken(name, tiny_package) as folder:
        found = verified(folder, ASKED)
    assert not found["passed"]
    assert SENTENCES[name] in " ".join(found["sentences"])

"""The kill test, as anyone can run it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_test.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        "files",
        pytest.param("resident", marks=pytest.mark.long),
        pytest.param("ranks", marks=pytest.mark.long),
    ],
)
def test_a_run_killed_again_and_again_ends_with_the_same_weights(path: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--path", path, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)[path]
    assert report["equal"]
    assert report["steps_once"]
    assert sum(kill["writing"] for kill in report["kills"]) >= 2

"""Real images and weights for tests: a folder named by FIELDMARK_SHARED, and nowhere else.

Without the variable, a test that needs them skips. With it, such a test must run: a missing file
is a failure, and so is any skip of a test marked `shared`.
"""

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "FIELDMARK_SHARED"


def shared_path(*parts: str) -> Path:
    """Return an existing path below the folder; skip, or fail if the folder lacks it."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"{VARIABLE} is not set: it names the folder with real images and weights.")
    path = Path(folder, *parts)
    if not path.exists():
        pytest.fail(f"{VARIABLE} is set, but {path} does not exist.", pytrace=False)
    return path


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Turn a skip of a test marked `shared` into a failure when FIELDMARK_SHARED is set."""
    report = yield
    is_skip = report.skipped and not hasattr(report, "wasxfail")
    if is_skip and os.environ.get(VARIABLE) and item.get_closest_marker("shared"):
        report.outcome = "failed"
        report.longrepr = f"{VARIABLE} is set, so this test must not skip. {report.longrepr[2]}"
    return report

"""Checkpoints: whole or recognised as not, and the right ones kept."""

from pathlib import Path

import pytest
import torch

from fieldmark.errors import CheckpointError
from fieldmark.training.checkpoint import (
    Best,
    checkpoint_path,
    load_checkpoint,
    load_newest,
    prune,
    read_header,
    remove_temporary,
    save_checkpoint,
)

STATE = {"network": {"w": torch.arange(1000.0)}, "note": "x"}


def save(folder: Path, *steps: int, best: Best | None = None) -> None:
    for step in steps:
        save_checkpoint(folder, step, {**STATE, "step": torch.tensor(step)}, best)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    best = Best(3, 0.75, 0.5)
    path = save_checkpoint(tmp_path, 7, STATE, best)
    header, state = load_checkpoint(path)
    assert (header.step, header.best) == (7, best)
    assert torch.equal(state["network"]["w"], STATE["network"]["w"])
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007.ckpt"]


@pytest.mark.parametrize("damage", ["truncate", "alter", "header", "empty", "extend"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1, 2)
    path = checkpoint_path(tmp_path, 2)
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(
        {
            "truncate": data[:-100],
            "alter": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
            "header": b"{" + data,
            "empty": b"",
            "extend": data + b"x",
        }[damage]
    )
    with pytest.raises(CheckpointError, match="step-00000002"):
        load_checkpoint(path)
    found = load_newest(tmp_path)
    assert found is not None
    assert found[0].step == 1
    assert "step-00000002" in capsys.readouterr().err


def test_no_pickled_code_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("run",))

    path = save_checkpoint(tmp_path, 1, {"network": Evil()}, None)
    with pytest.raises(Exception, match="[Ww]eights.only"):
        load_checkpoint(path)


def test_the_newest_and_each_ones_best_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2, 3, 4, best=Best(1, 0.9, 0.1))
    prune(tmp_path, keep=2)
    assert sorted(p.name[5:13] for p in tmp_path.iterdir()) == ["00000001", "00000003", "00000004"]
    save(tmp_path, 5, best=Best(5, 0.95, 0.1))
    prune(tmp_path, keep=2)
    # 4 may still be needed, should 5 turn out damaged, and 4's best is 1.
    assert sorted(p.name[5:13] for p in tmp_path.iterdir()) == ["00000001", "00000004", "00000005"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".step-00000002.ckpt.123.tmp").write_bytes(b"half")
    remove_temporary(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.ckpt"]


def test_a_full_disk_leaves_the_old_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fieldmark.runtime.files.os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device. Older checkpoints"):
        save(tmp_path, 2)
    assert read_header(checkpoint_path(tmp_path, 1)).step == 1
    assert len(list(tmp_path.iterdir())) == 1

"""Checkpoints: whole or recognised as not, and the right ones kept."""

import json
from pathlib import Path

import pytest
import torch

from fieldmark.errors import CheckpointError
from fieldmark.training.checkpoint import (
    Best,
    checkpoint_path,
    load_checkpoint,
    load_newest,
    must_fit,
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
    with pytest.raises(CheckpointError, match="[Ww]eights.only"):
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


def test_extra_facts_go_round(tmp_path: Path) -> None:
    extra = {"lr_scale": 0.25, "rollbacks": [{"step": 7, "why": "spike"}], "none": None}
    path = save_checkpoint(tmp_path, 1, STATE, None, extra)
    assert read_header(path).extra == extra
    assert load_checkpoint(path)[0].extra == extra
    assert read_header(save_checkpoint(tmp_path, 2, STATE, None)).extra == {}
    long = {"text": "x" * 100_000}  # prune reads headers: one that it took for damaged is deleted
    assert read_header(save_checkpoint(tmp_path, 3, STATE, None, long)).extra == long
    with pytest.raises(ValueError, match="extra must fit"):
        save_checkpoint(tmp_path, 4, STATE, None, {"text": "x" * 2**20})


def test_a_header_of_before_extra_and_its_own_checksum_still_loads(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 5, STATE, Best(5, 0.5, 1.0))
    line, _, payload = path.read_bytes().partition(b"\n")
    header = json.loads(line)
    del header["extra"], header["header_sha256"]
    path.write_bytes(json.dumps(header).encode() + b"\n" + payload)
    found, state = load_checkpoint(path)
    assert (found.step, found.best, found.extra) == (5, Best(5, 0.5, 1.0), {})
    assert torch.equal(state["network"]["w"], STATE["network"]["w"])


def test_a_fact_altered_in_the_header_is_noticed(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 5, STATE, Best(3, 0.5, 1.0), {"lr_scale": 0.25})
    whole = path.read_bytes()
    for before, after in ((b"0.25", b"0.75"), (b"[3, ", b"[2, ")):
        assert whole.count(before, 0, 300) == 1
        path.write_bytes(whole.replace(before, after, 1))
        with pytest.raises(CheckpointError, match="header cannot be read"):
            read_header(path)


def test_a_whole_checkpoint_that_torch_does_not_load_is_not_put_aside(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save_checkpoint(tmp_path, 2, {"network": Path("x")}, None)
    with pytest.raises(CheckpointError, match=r"is whole, but torch .* does not load it"):
        load_newest(tmp_path)
    assert checkpoint_path(tmp_path, 2).is_file()


def test_another_network_s_checkpoint_is_a_sentence() -> None:
    with (
        pytest.raises(CheckpointError, match="after update 7 must fit .* size mismatch"),
        must_fit(7),
    ):
        torch.nn.Linear(3, 4).load_state_dict(torch.nn.Linear(3, 5).state_dict())
    optimizer = torch.optim.SGD(torch.nn.Linear(3, 4).parameters())
    with pytest.raises(CheckpointError, match="different number of parameter groups"), must_fit(7):
        optimizer.load_state_dict({"state": {}, "param_groups": []})

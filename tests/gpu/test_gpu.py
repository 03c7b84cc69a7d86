"""What only a CUDA device can show: mixed precision with a scaler, and equal answers to the CPU."""

from pathlib import Path

import pytest
import torch

import fieldmark

pytestmark = pytest.mark.gpu

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("storage", ["resident", "files"])
def test_a_run_on_the_gpu_packages_what_the_cpu_repeats(
    tmp_path: Path, tiny_settings: list[str], precision: str, storage: str
) -> None:
    settings = [*tiny_settings, "train.device=cuda", f"train.precision={precision}"]
    result = fieldmark.train("digits", [*settings, f"data.storage={storage}"], out=tmp_path / "run")
    assert result.facts["top1_accuracy"]["value"] > 0.5
    assert fieldmark.export(str(tmp_path / "run")).passed


@needs_cuda
def test_a_resumed_run_equals_the_undisturbed_one(tmp_path: Path, tiny_settings: list[str]) -> None:
    from fieldmark.training.checkpoint import load_newest

    settings = [*tiny_settings, "train.device=cuda", "train.checkpoint_steps=5"]
    settings += ["train.keep_checkpoints=50"]
    states = []
    for name in ("calm", "resumed"):
        out = tmp_path / name
        fieldmark.train("digits", settings, out=out)
        if name == "resumed":
            for path in sorted((out / "checkpoints").glob("*.ckpt"))[2:]:
                path.unlink()
            (out / "metrics.json").unlink()
            fieldmark.train(out=out, resume=True)
        found = load_newest(out / "checkpoints")
        assert found is not None
        states.append(found[1]["network"])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])

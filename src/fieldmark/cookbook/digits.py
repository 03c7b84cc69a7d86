"""scikit-learn's handwritten digits: 1,797 real images that need no download."""

from fieldmark.config import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from fieldmark.cookbook.registry import recipe


@recipe("digits", evidence="benchmarks/results/main_job.json")
def digits() -> RunConfig:
    """A narrow airnet on 8x8 handwritten digits enlarged to 32 px: the quickstart.

    Run:    fieldmark train digits --out runs/digits
    Cost:   depends on the data.
    Source: Alpaydin and Kaynak 1998, UCI "Optical Recognition of Handwritten Digits".
    Result: 97 to 99.5 % expected on the held-out tenth.
    """
    return RunConfig(
        data=DataConfig(source="digits"),
        augment=AugmentConfig(crop_pad_px=3),  # no flip: a mirrored digit is another sign
        model=ModelConfig(arch="airnet", image_px=32, args={"widths": [16, 32, 64]}),
        optim=OptimConfig(lr=0.5, momentum=0.85, nesterov=True, weight_decay=5e-4),
        schedule=ScheduleConfig(name="linear", warmup_frac=0.2, warmup_start_factor=0.2),
        train=TrainConfig(epochs=12, batch_size=64),
    )

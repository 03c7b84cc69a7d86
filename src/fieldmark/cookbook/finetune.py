"""Pretrained weights on a user's own images."""

from fieldmark.config import (
    AugmentConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from fieldmark.cookbook.registry import recipe


@recipe("finetune")
def finetune() -> RunConfig:
    """A new head on pretrained weights, for a folder of your own images.

    The backbone is frozen; model.freeze=none trains it too (then lower optim.lr to about 3e-4).

    Run:    fieldmark train finetune data.source=folder:PATH model.pretrained=local-dir:PATH
    Source: Kornblith et al. 2019, arXiv:1805.08974, for frozen features with a new head.
    Result: depends on the data; the report at the end is measured on a held-out tenth.
    """
    return RunConfig(
        data=DataConfig(source="folder:images", val_frac=0.15, test_frac=0.15),
        augment=AugmentConfig(resized_crop=True, resized_crop_min_area_frac=0.35, flip="random"),
        model=ModelConfig(pretrained="timm:resnet50.a1_in1k", freeze="backbone"),
        loss=LossConfig(label_smoothing=0.1),
        optim=OptimConfig(name="adamw", lr=3e-3, weight_decay=1e-2, decay_norm_and_bias=False),
        schedule=ScheduleConfig(name="cosine", warmup_frac=0.1),
        train=TrainConfig(epochs=8, batch_size=32),
    )

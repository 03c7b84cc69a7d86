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
    """Pretrained weights with a new head, for a folder of your own images.

    The whole network is trained, its head fastest and each layer below it a little slower than
    the one above: early layers see edges and colours, which your images have too. Batch norms keep
    the statistics of the weights, because batches of 16 would only blur them. A set of fewer than
    450 images is seen more often than six times, until 170 updates are made.

    model.freeze=backbone trains the head alone, which is quicker on a CPU and less accurate; then
    optim.lr=1e-3 suits it. A network that does not name its layers needs optim.layer_decay=1.

    Run:    fieldmark train finetune data.source=folder:PATH model.pretrained=local-dir:PATH
    Source: Kornblith et al. 2019, arXiv:1805.08974, section 4; Bao et al. 2021, arXiv:2106.08254,
            for the rates of layers; Kolesnikov et al. 2019, arXiv:1912.11370, section 3.3, for a
            number of updates that does not shrink with the data.
    Result: depends on the data; it is measured on a held-out part of yours.
    """
    return RunConfig(
        data=DataConfig(source="folder:images", val_frac=0.15, test_frac=0.15),
        augment=AugmentConfig(resized_crop=True, resized_crop_min_area_frac=0.35, flip="random"),
        model=ModelConfig(pretrained="timm:resnet50.a1_in1k", freeze="statistics"),
        loss=LossConfig(label_smoothing=0.1),
        optim=OptimConfig(
            name="adamw",
            lr=4e-4,
            head_lr_factor=10,
            layer_decay=0.85,
            weight_decay=1e-2,
            decay_norm_and_bias=False,
        ),
        schedule=ScheduleConfig(name="cosine", warmup_frac=0.1),
        train=TrainConfig(epochs=6, min_steps=170, batch_size=16),
    )

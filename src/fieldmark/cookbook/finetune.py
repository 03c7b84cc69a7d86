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


@recipe("finetune", evidence="benchmarks/results/finetune_small.json")
def finetune() -> RunConfig:
    """Pretrained weights with a new head, for a folder of your own images.

    The whole network is trained, its head ten times as fast. How often the images are shown
    depends on how many there are; with augment.policy=auto how they are changed does too. Batch
    norms keep the statistics of the pretrained weights where an update is too small to make new
    ones. optim.layer_decay=0.9 makes higher rates safer, and changes little at this one.
    model.freeze=backbone trains the head alone, which is quicker on a CPU and less accurate; then
    optim.lr=1e-3 suits it.

    Run:    fieldmark train finetune data.source=folder:PATH model.pretrained=local-dir:PATH
    Cost:   depends on the data.
    Source: Kornblith et al. 2019, arXiv:1805.08974, section 4.
    Result: 81 % from 2,000 images of CIFAR-10 at 96 px with the weights of tf_efficientnet_lite0
            (1 seed), and 83 with augment.policy=auto (3 seeds); on yours it is measured on a
            held-out part.
    """
    return RunConfig(
        data=DataConfig(source="folder:images", val_frac=0.15, test_frac=0.15),
        augment=AugmentConfig(resized_crop=True, resized_crop_min_area_frac=0.35, flip="random"),
        model=ModelConfig(pretrained="timm:resnet50.a1_in1k", freeze="auto"),
        loss=LossConfig(label_smoothing=0.1),
        optim=OptimConfig(
            name="adamw",
            lr=3e-4,
            head_lr_factor=10,
            weight_decay=1e-2,
            decay_norm_and_bias=False,
        ),
        schedule=ScheduleConfig(name="cosine", warmup_frac=0.1),
        train=TrainConfig(epochs="auto", min_steps=60, batch_size=16),
    )

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

    The whole network is trained: its head ten times as fast, and each layer at 0.95 of the rate of
    the next one, as the first ones need to change least. How often the images are shown and how
    they are augmented depends on how many there are. Batch norms keep the statistics of the
    pretrained weights where an update is too small to make new ones. model.freeze=backbone trains
    the head alone, which is quicker on a CPU and less accurate; then optim.lr=1e-3 suits it.

    Run:    fieldmark train finetune data.source=folder:PATH model.pretrained=local-dir:PATH
    Cost:   depends on the data.
    Source: Kornblith et al. 2019, arXiv:1805.08974, section 4; Clark et al. 2020, arXiv:2003.10555,
            appendix B, for rates by layer.
    Result: with the weights of tf_efficientnet_lite0 83 % from 2,000 images of CIFAR-10 at 96 px (3
            seeds), and 91 % of photographs in six classes (4 seeds, 43 test images each); on yours
            it is measured on a held-out part.
    """
    return RunConfig(
        data=DataConfig(source="folder:images", val_frac=0.15, test_frac=0.15),
        augment=AugmentConfig(policy="auto"),
        model=ModelConfig(pretrained="timm:resnet50.a1_in1k", freeze="auto"),
        loss=LossConfig(label_smoothing=0.1),
        optim=OptimConfig(
            name="adamw",
            lr=3e-4,
            head_lr_factor=10,
            layer_decay=0.95,
            weight_decay=1e-2,
            decay_norm_and_bias=False,
        ),
        schedule=ScheduleConfig(name="cosine", warmup_frac=0.1),
        train=TrainConfig(epochs="auto", min_steps=60, batch_size=16),
    )

"""CIFAR-10: 50,000 training and 10,000 test images of 32 px in 10 classes."""

from fieldmark.config import (
    AugmentConfig,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    override,
)
from fieldmark.cookbook.registry import recipe


@recipe("cifar10-resnet18")
def cifar10_resnet18() -> RunConfig:
    """ResNet-18 with a 3x3 stem, SGD and cosine decay: the baseline of this data set.

    Run:    fieldmark train cifar10-resnet18 --out runs/resnet18
    Cost:   29.9 PFLOP, 8,985,600 images.
    Source: He et al. 2015, arXiv:1512.03385, section 4.2: 4 px padding, crop and flip.
    Result: 94.8 % published (mmpretrain, weight decay 1e-4, step decay, last weights).
    """
    return RunConfig(
        data=DataConfig(source="cifar10"),
        augment=AugmentConfig(crop_pad_px=4, flip="random"),
        model=ModelConfig(arch="resnet18"),
        optim=OptimConfig(lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule=ScheduleConfig(name="cosine"),
        train=TrainConfig(epochs=200, batch_size=128),
    )


@recipe("cifar10-resnet50")
def cifar10_resnet50() -> RunConfig:
    """ResNet-50 with a 3x3 stem, otherwise as cifar10-resnet18.

    Run:    fieldmark train cifar10-resnet50 --out runs/resnet50
    Cost:   69.9 PFLOP, 8,985,600 images.
    Source: He et al. 2015, arXiv:1512.03385.
    Result: 95.5 % published (mmpretrain, weight decay 1e-4, step decay, last weights).
    """
    return override(cifar10_resnet18(), ["model.arch=resnet50"])


@recipe("cifar10-efficientnet-b0")
def cifar10_efficientnet_b0() -> RunConfig:
    """ImageNet weights of EfficientNet-B0, fine-tuned on images enlarged to 128 px.

    The network shrinks its input 32 times: from scratch at 32 px it stays far below a ResNet. The
    weights are timm's, which needs a connection; model.pretrained=local-dir:PATH is a folder.

    Run:    fieldmark train cifar10-efficientnet-b0 --out runs/b0
    Cost:   5.67 PFLOP, 539,136 images.
    Source: Tan and Le 2019, arXiv:1905.11946, section 5.3; Kornblith et al. 2019,
            arXiv:1805.08974, section 4, for how to fine-tune.
    Result: 98.1 % published (Tan and Le, table 5, at 224 px); 97 % or more expected at 128 px. The
            95.8 % quoted for this network needs such weights too.
    """
    return RunConfig(
        data=DataConfig(source="cifar10"),
        augment=AugmentConfig(crop_pad_px=12, crop_pad_mode="reflect", flip="random"),
        model=ModelConfig(
            pretrained="timm:efficientnet_b0.ra_in1k",
            image_px=128,
            small_input="never",
            drop_rate=0.2,
            drop_path_rate=0.2,
        ),
        loss=LossConfig(label_smoothing=0.1),
        optim=OptimConfig(
            name="adamw",
            lr=1e-3,
            head_lr_factor=4,
            weight_decay=1e-2,
            decay_norm_and_bias=False,
        ),
        schedule=ScheduleConfig(name="cosine", warmup_frac=0.1),
        train=TrainConfig(epochs=12, batch_size=128),
        # The whole image: its 32 px have no margin to spare.
        eval=EvalConfig(crop_frac=1.0),
    )


@recipe("cifar10-smoke", evidence="benchmarks/results/main_job.json")
def cifar10_smoke() -> RunConfig:
    """A narrow airnet: real CIFAR-10 in minutes on a laptop's two cores.

    Run:    fieldmark train cifar10-smoke --out runs/smoke
    Cost:   0.0279 PFLOP, 180,000 images.
    Source: Jordan 2024, arXiv:2404.00498, narrowed and shortened.
    Result: 82 to 86 % expected.
    """
    return RunConfig(
        data=DataConfig(source="cifar10"),
        augment=AugmentConfig(crop_pad_px=2, crop_pad_mode="reflect", flip="alternating"),
        model=ModelConfig(arch="airnet", args={"widths": [32, 96, 128]}),
        loss=LossConfig(label_smoothing=0.2),
        optim=OptimConfig(lr=1.5, momentum=0.85, nesterov=True, weight_decay=1e-3),
        schedule=ScheduleConfig(name="linear", warmup_frac=0.2, warmup_start_factor=0.2),
        train=TrainConfig(epochs=4, batch_size=500),
    )

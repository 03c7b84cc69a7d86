"""ImageNet-1k: 1,281,167 training and 50,000 validation images in 1,000 classes; convolutions.

The public validation images are the test split. A hundredth of the training images is held out
to choose the epoch, so that the published number is never chosen on; data.val_frac=0 trains on all
images, as the sources did, and keeps the last weights. On a GPU add train.precision=bfloat16.
"""

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


@recipe("imagenet-resnet50")
def imagenet_resnet50() -> RunConfig:
    """ResNet-50 with SGD and a rate that falls to a tenth every 30 epochs: the baseline.

    Run:    fieldmark train imagenet-resnet50 data.source=imagenet:PATH
    Cost:   2,774 PFLOP, 114,140,160 images.
    Source: He et al. 2015, arXiv:1512.03385, with the settings of torchvision's references
            (IMAGENET1K_V1: 8 GPUs of 32 images).
    Result: 76.13 % published (torchvision); 76.5 % is often quoted for this kind of training.
    """
    return RunConfig(
        data=DataConfig(source="imagenet:imagenet", val_frac=0.01, num_workers=8),
        augment=AugmentConfig(resized_crop=True, flip="random"),
        model=ModelConfig(arch="resnet50", image_px=224),
        optim=OptimConfig(lr=0.1, momentum=0.9, weight_decay=1e-4),
        schedule=ScheduleConfig(name="step", step_epochs=30, step_factor=0.1),
        train=TrainConfig(epochs=90, batch_size=256),
        eval=EvalConfig(crop_frac=224 / 256, interpolation="bilinear"),
    )


@recipe("imagenet-resnet50-tv2")
def imagenet_resnet50_tv2() -> RunConfig:
    """ResNet-50 trained long at 176 px: the second weights of torchvision.

    The average moves every 32 updates and keeps 0.9989077, which is what its script makes of
    "0.99998" for this batch size and length. Vectors are not decayed, there only those of norms:
    the difference is the head's bias.

    Run:    fieldmark train imagenet-resnet50-tv2 data.source=imagenet:PATH
    Cost:   11,792 PFLOP, 760,627,200 images.
    Source: Vryniotis 2021, "How to Train State-Of-The-Art Models Using TorchVision's Latest
            Primitives", and torchvision's references (IMAGENET1K_V2: 8 GPUs of 128 images).
    Result: 80.86 % published (torchvision, at 224 px).
    """
    return RunConfig(
        data=DataConfig(source="imagenet:imagenet", val_frac=0.01, num_workers=8, repeats=4),
        augment=AugmentConfig(
            resized_crop=True,
            flip="random",
            ops="trivialaugment",
            erase_prob=0.1,
            erase_mode="constant",
            mixup_alpha=0.2,
            cutmix_alpha=1.0,
            sizes=((0.0, 176),),
        ),
        model=ModelConfig(arch="resnet50", image_px=224),
        loss=LossConfig(label_smoothing=0.1),
        optim=OptimConfig(lr=0.5, momentum=0.9, weight_decay=2e-5, decay_norm_and_bias=False),
        schedule=ScheduleConfig(name="cosine", warmup_epochs=5, warmup_start_factor=0.01),
        train=TrainConfig(epochs=600, batch_size=1024, ema_decay=0.9989077, ema_steps=32),
        eval=EvalConfig(crop_frac=224 / 232, interpolation="bilinear"),
    )


@recipe("imagenet-resnet50-a2")
def imagenet_resnet50_a2() -> RunConfig:
    """ResNet-50 with LAMB, a binary loss for each class, and mixed images, in 300 epochs.

    Run:    fieldmark train imagenet-resnet50-a2 data.source=imagenet:PATH
    Cost:   9,241 PFLOP, 380,313,600 images.
    Source: Wightman, Touvron and Jegou 2021, arXiv:2110.00476, procedure A2. What the paper leaves
            open is as in its code: warm-up from 1e-4, end at 1e-6, a target above 0.2 counts as 1.
    Result: 79.8 % published (224 px).
    """
    return RunConfig(
        data=DataConfig(source="imagenet:imagenet", val_frac=0.01, num_workers=8, repeats=3),
        augment=AugmentConfig(
            resized_crop=True,
            flip="random",
            ops="randaugment",
            ops_magnitude=7,
            ops_magnitude_std=0.5,
            mixup_alpha=0.1,
            cutmix_alpha=1.0,
        ),
        model=ModelConfig(arch="resnet50", image_px=224, drop_path_rate=0.05),
        loss=LossConfig(name="bce", bce_threshold=0.2),
        optim=OptimConfig(name="lamb", lr=5e-3, weight_decay=0.02, decay_norm_and_bias=False),
        schedule=ScheduleConfig(
            name="cosine",
            warmup_epochs=5,
            warmup_start_factor=1e-4 / 5e-3,
            decay_from="start",
            end_factor=1e-6 / 5e-3,
        ),
        train=TrainConfig(epochs=300, batch_size=2048),
        eval=EvalConfig(crop_frac=0.95, interpolation="bicubic"),
    )


@recipe("imagenet-resnet50-a1")
def imagenet_resnet50_a1() -> RunConfig:
    """ResNet-50 as imagenet-resnet50-a2, but for 600 epochs and with smoothed labels.

    Targets count as they are: a threshold would undo the smoothing.

    Run:    fieldmark train imagenet-resnet50-a1 data.source=imagenet:PATH
    Cost:   18,483 PFLOP, 760,627,200 images.
    Source: Wightman, Touvron and Jegou 2021, arXiv:2110.00476, procedure A1.
    Result: 80.4 % published (224 px).
    """
    return override(
        imagenet_resnet50_a2(),
        [
            "train.epochs=600",
            "optim.weight_decay=0.01",
            "augment.mixup_alpha=0.2",
            "loss.label_smoothing=0.1",
            "loss.bce_threshold=0",
        ],
    )


@recipe("imagenet-resnet50-a3")
def imagenet_resnet50_a3() -> RunConfig:
    """ResNet-50 as imagenet-resnet50-a2, but in 100 epochs at 160 px: the cheapest of the three.

    Run:    fieldmark train imagenet-resnet50-a3 data.source=imagenet:PATH
    Cost:   1,572 PFLOP, 126,771,200 images.
    Source: Wightman, Touvron and Jegou 2021, arXiv:2110.00476, procedure A3.
    Result: 78.1 % published (224 px).
    """
    return override(
        imagenet_resnet50_a2(),
        [
            "train.epochs=100",
            "data.repeats=1",
            "augment.ops_magnitude=6",
            "augment.sizes=[[0, 160]]",
            "model.drop_path_rate=0",
            "optim.lr=8e-3",
            f"schedule.warmup_start_factor={1e-4 / 8e-3}",
            f"schedule.end_factor={1e-6 / 8e-3}",
        ],
    )


@recipe("imagenet-efficientnet-b4")
def imagenet_efficientnet_b4() -> RunConfig:
    """EfficientNet-B4 with RMSprop, RandAugment and an average of the weights, at 320 px.

    Of this training its authors published the commands for B0 and B2 only. This is B2's, with the
    dropout that the paper gives B4.

    Run:    fieldmark train imagenet-efficientnet-b4 data.source=imagenet:PATH
    Cost:   170,233 PFLOP, 570,700,800 images.
    Source: Wightman, timm's training examples (EfficientNet-B2 with RandAugment); Tan and Le 2019,
            arXiv:1905.11946, section 5.2 and table 2; Cubuk et al. 2019, arXiv:1909.13719.
    Result: 83.5 % published (timm's ra2_in1k weights, at 384 px); 82.9 % is the paper's, at 380 px.
    """
    return RunConfig(
        data=DataConfig(source="imagenet:imagenet", val_frac=0.01, num_workers=8),
        augment=AugmentConfig(
            resized_crop=True,
            flip="random",
            ops="randaugment",
            ops_magnitude=9,
            ops_magnitude_std=0.5,
            erase_prob=0.2,
            erase_mode="pixel",
            sizes=((0.0, 320),),
        ),
        model=ModelConfig(arch="efficientnet_b4", image_px=384, drop_rate=0.4, drop_path_rate=0.2),
        loss=LossConfig(label_smoothing=0.1),
        optim=OptimConfig(
            name="rmsproptf",
            lr=0.016,
            momentum=0.9,
            weight_decay=1e-5,
            decay_norm_and_bias=False,
            args={"eps": 1e-3},
        ),
        schedule=ScheduleConfig(
            name="step",
            step_epochs=2.4,
            step_factor=0.97,
            decay_from="start",
            warmup_epochs=3,
            warmup_start_factor=1e-6 / 0.016,
        ),
        train=TrainConfig(epochs=450, batch_size=256, ema_decay=0.9999),
        eval=EvalConfig(crop_frac=1.0, interpolation="bicubic"),
    )

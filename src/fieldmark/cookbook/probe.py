"""A linear head on the features of pretrained weights."""

from fieldmark.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from fieldmark.cookbook.registry import recipe


@recipe("linear-probe", evidence="benchmarks/results/finetune.json")
def linear_probe() -> RunConfig:
    """A linear head on frozen pretrained features, in about a minute for a few thousand images.

    Each image passes the network once; then a logistic regression is fitted to the features, its
    penalty chosen by cross-validation on the train split. probe.views=mirrored adds mirror images,
    which costs twice the time; not for letters, digits, or anything that has a left and a right.

    Run:    fieldmark train linear-probe data.source=folder:PATH model.pretrained=local-dir:PATH
    Cost:   depends on the data.
    Source: Kornblith et al. 2019, arXiv:1805.08974, section 3.
    Result: depends on the data. With tf_efficientnet_lite0 at 128 px and a JPEG copy of CIFAR-10,
            on 2 cores: 73.1 % from 2,000 images in 41 s, 79.8 % from all 50,000 in 11.6 minutes.
    """
    return RunConfig(
        data=DataConfig(source="folder:images", val_frac=0.15, test_frac=0.15),
        model=ModelConfig(pretrained="timm:tf_efficientnet_lite0.in1k"),
        train=TrainConfig(method="linear-probe"),
        eval=EvalConfig(batch_size=64),
    )

"""Networks: any timm architecture, stems adapted to small images, and airnet.

Importing this room registers our own builders with timm, so that `timm.create_model` knows them.
"""

from fieldmark.model.airnet import AirNet
from fieldmark.model.build import (
    Architecture,
    Weights,
    build,
    check_image_size,
    num_parameters,
    takes_img_size,
)
from fieldmark.model.features import FeatureModule
from fieldmark.model.freeze import Freeze, freeze_backbone, head_parameters, set_train_mode
from fieldmark.model.inference import InferenceModule, eager_predict
from fieldmark.model.small_input import adapt_architecture, opens_in, register_small_builders

register_small_builders()

__all__ = [
    "AirNet",
    "Architecture",
    "FeatureModule",
    "Freeze",
    "InferenceModule",
    "Weights",
    "adapt_architecture",
    "build",
    "check_image_size",
    "eager_predict",
    "freeze_backbone",
    "head_parameters",
    "num_parameters",
    "opens_in",
    "set_train_mode",
    "takes_img_size",
]

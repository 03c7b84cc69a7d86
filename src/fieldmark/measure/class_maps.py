"""Where in an image a class was seen: the last feature map through the head's weights."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def class_maps(features_BCHW: Floats, weight_KC: Floats, bias_K: Floats) -> Floats:
    """Return a map (B, K, h, w) for each class, whose mean over h and w is the class's logit.

    That holds exactly for a network whose logits are the mean of its features through one linear
    layer; the rows of the weight and the bias may be those of some of the classes.

    Source: Zhou et al. 2016, "Learning Deep Features for Discriminative Localization",
    arXiv:1512.04150, equation 2. The bias is added here, so that the mean is the logit.
    """
    maps: Floats = np.einsum("kc,bchw->bkhw", weight_KC, features_BCHW, optimize=True)
    return maps + bias_K[:, None, None]

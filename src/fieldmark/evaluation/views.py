"""Answers averaged over several views of an image."""

import numpy as np
import numpy.typing as npt

from fieldmark.measure import Predict

_SHIFT_PX = 1


def six_views(predict: Predict) -> Predict:
    """Return a predictor whose logits are a mean over six views: half the image and its mirror.

    The other half are the image shifted by one pixel, up and left or down and right, each with its
    mirror; the edge is filled by reflection.
    Source: Jordan 2024, arXiv:2404.00498, section 3.2 (there "multi-crop").
    """

    def predict_six(images_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        padded = np.pad(
            images_BHWC,
            ((0, 0), (_SHIFT_PX, _SHIFT_PX), (_SHIFT_PX, _SHIFT_PX), (0, 0)),
            mode="reflect",
        )
        far = 2 * _SHIFT_PX
        shifted = (padded[:, :-far, :-far], padded[:, far:, far:])
        weighted = [(0.25, images_BHWC), *((0.125, view) for view in shifted)]
        logits = np.zeros((), dtype=np.float32)
        for weight, view in weighted:
            for seen in (view, view[:, :, ::-1]):
                logits = logits + np.float32(weight) * predict(np.ascontiguousarray(seen))
        return logits

    return predict_six

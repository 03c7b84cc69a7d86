"""Six views against the average written out on normalised images."""

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from fieldmark.evaluation.views import six_views
from fieldmark.model import Architecture, build


def test_it_is_the_weighted_mean_of_the_views() -> None:
    torch.manual_seed(0)
    network = build(Architecture("airnet", 5, {"widths": [8, 8, 8]})).eval()
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)

    @torch.no_grad()
    def predict(seen: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        assert seen.dtype == np.uint8
        assert seen.shape == images.shape
        logits: npt.NDArray[np.float32] = network(to_input(seen)).numpy()
        return logits

    def to_input(seen: npt.NDArray[np.uint8]) -> torch.Tensor:
        return torch.from_numpy(seen).permute(0, 3, 1, 2).float() / 255

    x = to_input(images)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")

    def both(view: torch.Tensor) -> torch.Tensor:
        mean: torch.Tensor = (network(view) + network(view.flip(3))) / 2
        return mean

    with torch.no_grad():
        corners = (both(padded[:, :, :32, :32]) + both(padded[:, :, 2:, 2:])) / 2
        wanted = (both(x) + corners) / 2
    np.testing.assert_allclose(six_views(predict)(images), wanted.numpy(), rtol=1e-4, atol=1e-6)

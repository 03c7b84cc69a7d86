"""What a batch costs: seconds as a line over its images, learnt from the batches that ran."""

_MEMORY = 0.98  # weight of what was known, with each batch: about the last 50 count


class BatchCost:
    """The seconds of a batch of n images, a * n + b, by least squares over recent batches.

    Neither a nor b is below 0. While all batches had one size, the line goes through 0.
    """

    def __init__(self) -> None:
        self._weight = self._n = self._nn = self._t = self._nt = 0.0
        self._line = (0.0, 0.0)

    @property
    def is_known(self) -> bool:
        """Whether any batch was measured."""
        return self._weight > 0

    def add(self, num_images: int, seconds: float) -> None:
        """Take a batch that ran into account."""
        sums = (1.0, num_images, num_images**2, seconds, num_images * seconds)
        known = (self._weight, self._n, self._nn, self._t, self._nt)
        self._weight, self._n, self._nn, self._t, self._nt = (
            _MEMORY * old + new for old, new in zip(known, sums, strict=True)
        )
        self._line = self._fitted()  # once a batch, and not for each forecast

    def line(self) -> tuple[float, float]:
        """Return a, seconds for each image, and b, seconds for each batch; zeros if unknown."""
        return self._line

    def _fitted(self) -> tuple[float, float]:
        through_zero = self._nt / self._nn
        spread = self._nn * self._weight - self._n**2
        if spread <= 1e-9 * self._nn * self._weight:
            return through_zero, 0.0
        slope = (self._nt * self._weight - self._n * self._t) / spread
        level = (self._t - slope * self._n) / self._weight
        if level < 0:
            return through_zero, 0.0
        if slope < 0:
            return 0.0, self._t / self._weight
        return slope, level

    def seconds(self, num_images: int, max_batch_size: int) -> float:
        """Return how long images take that go through the model in batches, one after another."""
        slope, level = self._line
        num_batches = -(-num_images // max_batch_size)
        return slope * num_images + level * num_batches

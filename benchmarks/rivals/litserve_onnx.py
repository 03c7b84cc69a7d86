"""LitServe, tuned, over the package's ONNX variant: python FILE PORT PACKAGE."""

import sys

import litserve as ls
import numpy as np
from fastapi import UploadFile
from same_model import SameModel


class Api(ls.LitAPI):
    """Batches of up to 8 within 10 ms."""

    def setup(self, device):
        """Open the model in each worker."""
        self.model = SameModel(sys.argv[2])

    def decode_request(self, request: UploadFile):
        """Return the model's input."""
        return self.model.decode(request.file.read())

    def batch(self, inputs):
        """Return the batch."""
        return np.stack(inputs)

    def predict(self, batch):
        """Return the logits."""
        return self.model.predict(batch)

    def unbatch(self, output):
        """Return the rows."""
        return list(output)

    def encode_response(self, output):
        """Return the answer."""
        return self.model.best(output)


if __name__ == "__main__":
    server = ls.LitServer(
        Api(max_batch_size=8, batch_timeout=0.01),
        accelerator="cpu",
        workers_per_device=2,
        fast_queue=True,
        timeout=60,
    )
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )

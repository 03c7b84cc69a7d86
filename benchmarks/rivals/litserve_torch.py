"""LitServe as its documentation shows it, torch in eager mode: python FILE PORT PACKAGE MODEL."""

import sys

import litserve as ls
from fastapi import UploadFile
from torch_model import TorchModel, model_named


class Api(ls.LitAPI):
    """One image at a time."""

    def setup(self, device):
        """Load the network."""
        self.model = TorchModel(model_named())

    def decode_request(self, request: UploadFile):
        """Return the network's input."""
        return self.model.decode(request.file.read())

    def predict(self, image):
        """Return the class."""
        return int(self.model.predict(image[None]).argmax())

    def encode_response(self, output):
        """Return the answer."""
        return {"class": output}


if __name__ == "__main__":
    server = ls.LitServer(Api(), accelerator="cpu", timeout=60)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )

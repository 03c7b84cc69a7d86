"""FastAPI and torch, as tutorials show it: python FILE PORT PACKAGE MODEL."""

import sys
from typing import Annotated

import uvicorn
from fastapi import FastAPI, File
from torch_model import TorchModel, model_named

app = FastAPI()
model = TorchModel(model_named())


@app.post("/predict")
def predict(request: Annotated[bytes, File()]) -> dict[str, int]:
    """Classify one image."""
    return {"class": int(model.predict(model.decode(request)[None]).argmax())}


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), access_log=False, log_level="warning")

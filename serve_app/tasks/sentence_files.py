"""What the files of sentence-transformers say: which modules make an answer, and how (sentence-transformers 6.2).

`modules.json` lists the modules of a chain, `config_sentence_transformers.json` says which class saved them, and
`sentence_bert_config.json` has the options of the first module. A model without `modules.json` is a bare transformer.
What is not computed here as sentence-transformers computes it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from serve_app.config import TaskName
from serve_app.errors import ConfigError
from serve_app.paths import check_relative
from serve_app.tasks.json_files import Json, read_list, read_object
from serve_app.types import Activation

_TRANSFORMERS = ("Transformer", "MLMTransformer")

_CHAINS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "SentenceTransformer": (("Transformer", "Pooling"), ("Transformer", "Pooling", "Normalize")),
    "SparseEncoder": tuple((first, "SpladePooling") for first in _TRANSFORMERS),
    "CrossEncoder": (("Transformer",),),
}
"""The chains that are computed, by the class that saved them."""

_TRANSFORMER_TASKS = {
    "SentenceTransformer": "feature-extraction",
    "SparseEncoder": "fill-mask",
    "CrossEncoder": "sequence-classification",
}
"""`transformer_task` of the first module: the head of the transformer whose output the chain begins with."""

_OUTPUTS = {
    "SentenceTransformer": "last_hidden_state",
    "SparseEncoder": "logits",
    "CrossEncoder": "logits",
}

_OPTION_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)

_CHANGES_ANSWERS = (
    *("processing_kwargs", "query_length", "document_length", "query_expansion", "tokenizer_name_or_path"),
    *("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs"),
)
"""Options of the first module that are not followed."""

_HARMLESS = frozenset({"attn_implementation", "dtype", "torch_dtype", "trust_remote_code", "use_cache"})
"""Keys within those that change no answer, or are the configuration's to say."""

_ACTIVATIONS: Mapping[str, Activation] = {"Identity": "identity", "Sigmoid": "sigmoid", "Tanh": "tanh"}


@dataclass(frozen=True, slots=True)
class Chain:
    """The modules that a model was saved with, in order: class and folder of each; none for a bare transformer."""

    modules: tuple[tuple[str, str], ...]
    saved_by: str
    """Class that saved them; empty for a bare transformer."""

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.modules)

    def folder_of(self, *classes: str) -> str | None:
        """Of the first module of one of these classes."""
        return next((folder for name, folder in self.modules if name in classes), None)


def read_chain(path: Path) -> Chain:
    """Raises ConfigError where a module's code is not that of sentence-transformers, IncompleteModelError where a file
    is broken or a module lies outside of `path`.
    """
    entries = read_list(path / "modules.json")
    if not entries:
        return Chain((), "")
    for entry in entries:
        if entry["path"]:  # empty: the model's own
            check_relative(str(entry["path"]))
    foreign = [str(entry["type"]) for entry in entries if str(entry["type"]).split(".")[0] != "sentence_transformers"]
    if foreign:
        raise ConfigError(
            f"{path.name}: modules.json names {', '.join(foreign)}, which is code of the repository or of another "
            "package, and is never run. Serve a model whose modules are those of sentence-transformers"
        )
    modules = tuple((str(entry["type"]).rsplit(".", 1)[-1], str(entry["path"])) for entry in entries)
    named = read_object(path / "config_sentence_transformers.json").get("model_type")
    sparse = "SparseEncoder" if any(name == "SpladePooling" for name, _ in modules) else "SentenceTransformer"
    return Chain(modules, str(named) if named else sparse)  # older ones do not tell it


def transformer_folder(path: Path) -> Path:
    """The folder of the weights, `config.json` and the tokenizer: `path`, or the one `modules.json` names below it."""
    return path / (read_chain(path).folder_of(*_TRANSFORMERS) or "")


def task_of_chain(chain: Chain, num_labels: int) -> TaskName:
    """What a model that sentence-transformers saved is for."""
    if chain.saved_by == "CrossEncoder":
        return "rerank" if num_labels == 1 else "text-classification"
    return "sparse-embedding" if chain.saved_by == "SparseEncoder" else "embedding"


def check_chain(path: Path, chain: Chain, where: str) -> None:
    """Raises ConfigError, which begins with `where`, if the chain computes what is not computed here."""
    named = " → ".join(chain.classes)
    known = _CHAINS.get(chain.saved_by)
    if known is None:
        raise ConfigError(
            f"{where}: it was saved as a {chain.saved_by} of sentence-transformers, which is not supported; only "
            f"{', '.join(_CHAINS)} are"
        )
    if chain.classes not in known:
        raise ConfigError(
            f"{where}: modules.json has the modules {named}, which is not supported: of a {chain.saved_by} only "
            f"{' or '.join(' → '.join(each) for each in known)} is. With other modules the answers would be other ones"
        )
    for name, folder in chain.modules[1:]:
        _check_names(read_object(path / folder / "config.json"), name, where)
    _check_options(chain, options_of(path / (chain.modules[0][1])), where)


def _check_names(module: Json, name: str, where: str) -> None:
    for key in ("module_input_name", "module_output_name"):
        if module.get(key) not in (None, "sentence_embedding"):
            raise ConfigError(f"{where}: {name} has {key}: {module[key]}, which is not supported")


def options_of(folder: Path) -> Json:
    """The options of the first module, from the first of the names that sentence-transformers looks for."""
    return next((found for name in _OPTION_FILES if (found := read_object(folder / name))), {})


def _check_options(chain: Chain, options: Json, where: str) -> None:
    wanted = _TRANSFORMER_TASKS[chain.saved_by]
    told = options.get("transformer_task", wanted)
    if told != wanted:
        raise ConfigError(
            f"{where}: a {chain.saved_by} with transformer_task: {told} is not supported; only {wanted} is"
        )
    modalities = options.get("modality_config") or {}
    text = {"method": "forward", "method_output_name": _OUTPUTS[chain.saved_by]}
    if "message" in modalities:
        raise ConfigError(
            f"{where}: it puts texts into a chat template (modality_config has message), which is not supported"
        )
    if modalities and modalities.get("text") != text:
        raise ConfigError(f"{where}: modality_config asks for {modalities.get('text')}, and only {text} is supported")
    for key in _CHANGES_ANSWERS:
        value = options.get(key)
        if value and not (isinstance(value, dict) and set(value) <= _HARMLESS):
            raise ConfigError(f"{where}: sentence_bert_config.json sets {key} ({value}), which is not supported")


def activation_of(path: Path, chain: Chain, model: Json, where: str) -> Activation:
    """What a cross-encoder of one label makes its scores with: its `activation_fn`, else a sigmoid.

    The order is that of sentence-transformers: config_sentence_transformers.json, then `sentence_transformers` in
    config.json, then `sbert_ce_default_activation_function` there, which versions before 4.0 wrote. Raises ConfigError
    for a function that is not supported.
    """
    named = None
    if chain.saved_by == "CrossEncoder":
        named = read_object(path / "config_sentence_transformers.json").get("activation_fn")
    own = model.get("sentence_transformers")
    if named is None and isinstance(own, dict) and "activation_fn" in own:
        named = own["activation_fn"]
    elif named is None:
        named = model.get("sbert_ce_default_activation_function")
    if named is None:
        return "sigmoid"
    package, _, name = str(named).rpartition(".")
    if package.split(".")[0] != "torch" or name not in _ACTIVATIONS:
        raise ConfigError(
            f"{where}: its activation function {named} is not supported; only torch's {', '.join(_ACTIVATIONS)} are"
        )
    return _ACTIVATIONS[name]

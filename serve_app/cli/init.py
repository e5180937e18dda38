"""`serve-app init`: a serve_config.yaml for these models, that fits this machine or so many GPUs.

A model's own files say its task, its longest input and its size; a branch on the Hub is pinned to the commit that it
points to now. The text is that of `templates/`, from which the repository's own serve_config.yaml is made too.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import yaml

from serve_app.cache.hub import Hub
from serve_app.cache.resolve import files_in, source_folder
from serve_app.cache.selection import needed_files
from serve_app.config import GENERATING_TASKS, CacheConfig, ModelConfig, name_clashes, parse, source_kind
from serve_app.errors import ConfigError
from serve_app.tasks.card import read_card, transformer_folder
from serve_app.types import ModelCard

HUB_TIMEOUT_S = 120.0
"""For all questions about one model; its weights are not downloaded here."""

MOST_CPU_REPLICAS = 16
"""Of one model on one machine. Each has the weights for itself; beyond it replicas get more threads instead."""

LIGHT_CPUS = 0.1
CPU_BATCH_TOKENS = 1024
PROCESS_BYTES = 700 << 20
"""Of a model replica beside its weights: Python, torch, and the activations of a batch of 1,024 tokens."""

MEMORY_SHARE = 0.8
"""Of this machine's free memory that replicas may take."""

ALONE_GENERATING = 3
"""So many replicas that generate may each take a quarter of the free memory for keys and values, as is the default."""

KV_TOKENS = 16_384

COMMENT_COLUMN = 52

_BYTES_OF = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
_WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True, slots=True)
class Subject:
    """One model to serve, and what its files say."""

    config: ModelConfig
    card: ModelCard
    parameters: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What the models are served on: cores and bytes of memory, or GPUs."""

    cores: int
    memory_bytes: int
    gpus: int = 0

    def __str__(self) -> str:
        if self.gpus:
            return "a machine of one GPU" if self.gpus == 1 else f"{self.gpus} GPUs"
        return f"a machine of {self.cores} core{'s' if self.cores > 1 else ''}"


@dataclass(frozen=True, slots=True)
class Tiers:
    """How one model is deployed."""

    replicas: int
    threads: int
    tokenizers: int
    gpus: float
    surge: int
    """Percent of replicas that may run beside the old ones in a roll-out."""

    def surging(self, replicas: int) -> int:
        """How many of a tier with so many."""
        return math.ceil(replicas * self.surge / 100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="[NAME=]SOURCE",
        help="a directory, package:<module>/<folder>, or <org>/<name>[@<branch, tag or commit>] on the Hub; NAME is "
        "what clients call the model, by default the last part of the source",
    )
    parser.add_argument("--gpus", type=int, default=0, help="serve on so many GPUs instead of this machine's cores")
    parser.add_argument("--task", help="what the models are served for, where their files leave it open")
    parser.add_argument("--output", type=Path, default=Path("serve_config.yaml"), help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="overwrite the file if it is there")


def run(args: argparse.Namespace) -> int:
    if args.gpus < 0:
        raise ConfigError("--gpus: must be 0 or more")
    if args.output.exists() and not args.force:
        raise ConfigError(f"{args.output} is there already; give another --output, or --force to overwrite it")
    subjects = [_read(given, args.task) for given in args.sources]
    text = serve_file(subjects, this_machine(args.gpus), args.output.name)
    args.output.write_text(text, "utf-8")
    for subject in subjects:
        print(
            f"{subject.config.name}: {subject.card.task}, {subject.parameters / 1e6:,.1f} million parameters, "
            f"inputs of up to {subject.card.max_input_tokens} tokens"
        )
    print(f"Wrote {args.output}. Next: serve-app serve {args.output}")
    return 0


def this_machine(gpus: int = 0) -> Machine:
    from serve_app.model.host import available_cores, available_memory_bytes  # which imports torch

    return Machine(available_cores(), available_memory_bytes(), gpus)


@contextmanager
def complete(path: Path) -> Iterator[Path]:
    """The file itself, or, where it lists only `models:` (and `cache:`), one made of it with all that `init` writes.

    Raises ConfigError where the models in it are wrong.
    """
    listed = _listed(path)
    if listed is None:
        yield path
        return
    unknown = sorted(set(listed) - {"models", "cache"})
    if unknown:
        raise ConfigError(
            f"{path}: {', '.join(unknown)} cannot stand beside models; `serve-app init` writes a whole file"
        )
    cache = parse(CacheConfig, listed.get("cache"), "cache")
    models = [parse(ModelConfig, raw, f"models[{i}]") for i, raw in enumerate(listed["models"])]
    text = serve_file([_subject(model) for model in models], this_machine(), path.name, cache)
    with tempfile.TemporaryDirectory(prefix="serve_app_") as folder:
        file = Path(folder, path.name)
        file.write_text(text, "utf-8")
        yield file


def _listed(path: Path) -> Mapping[str, Any] | None:
    """The file's content where it has models and no applications; whoever reads it tells of all else."""
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    is_list = isinstance(raw, dict) and isinstance(raw.get("models"), list) and "applications" not in raw
    return raw if is_list else None


# --- what a model's files say


def _read(given: str, task: str | None) -> Subject:
    name, _, source = given.rpartition("=")
    source, _, revision = source.partition("@") if _is_on_hub(source) else (source, "", "")
    raw: dict[str, Any] = {"name": name or _name_of(source), "source": _absolute(source), "task": task}
    if _is_on_hub(source):
        raw["revision"] = Hub(HUB_TIMEOUT_S).commit_of(source, revision or "main")
    return _subject(parse(ModelConfig, raw, given))


def _is_on_hub(source: str) -> bool:
    try:
        return not Path(source).is_dir() and source_kind(source.partition("@")[0]) == "hub"
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _absolute(source: str) -> str:
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def _name_of(source: str) -> str:
    """The last part of the source, as far as a name may have its characters."""
    inner = source.removeprefix("package:").partition("/")[0] if source.startswith("package:") else source
    last = Path(inner).expanduser().resolve().name if not _is_on_hub(source) else inner.rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).lstrip("._-")[:96] or "model"


def _subject(config: ModelConfig) -> Subject:
    if source_kind(config.source) != "hub":
        folder = source_folder(config.source)
        sizes = {path: (folder / path).stat().st_size for path in files_in(folder, config)}
        return _described(config, folder, sizes)
    assert config.revision is not None, "the configuration requires one for the Hub"
    hub = Hub(HUB_TIMEOUT_S)
    files = {file.path: file for file in hub.list_files(config.source, config.revision)}
    needed = needed_files(sorted(files), config.source, config.files, allow_pickle=config.allow_pickle)
    with tempfile.TemporaryDirectory() as into:
        small = [files[path] for path in needed if not path.endswith(_WEIGHTS)]
        hub.download(config.source, config.revision, small, Path(into))
        return _described(config, Path(into), {path: files[path].size for path in needed})


def _described(config: ModelConfig, folder: Path, sizes: Mapping[str, int]) -> Subject:
    """`sizes` are the bytes of each file that is needed."""
    weights = sum(size for path, size in sizes.items() if path.endswith(_WEIGHTS))
    model = json.loads((transformer_folder(folder) / "config.json").read_text("utf-8"))
    kind = str(model.get("dtype") or model.get("torch_dtype") or "float32").removeprefix("torch.")
    card = read_card(folder, config, config.revision or "")
    return Subject(config, card, weights // _BYTES_OF.get(kind, 4))


# --- what fits


def serve_file(subjects: Sequence[Subject], machine: Machine, file_name: str, cache: CacheConfig | None = None) -> str:
    """A whole serve_config.yaml. Raises ConfigError where names clash or the models do not fit."""
    clashes = name_clashes([subject.config for subject in subjects])
    if clashes:
        raise ConfigError(f"two models are called {clashes[0]}; give one of them another name: NAME=SOURCE")
    tiers = [_tiers(subject, machine, len(subjects), place) for place, subject in enumerate(subjects)]
    light, heavy = _shares(tiers, machine)
    names = " and ".join(subject.config.name for subject in subjects)
    head = (
        f"`serve-app serve {file_name}` serves {names} on http://127.0.0.1:8000 on {machine}. The same file is the "
        "template for a cluster: docs/cluster.md says what to raise."
    )
    server = {
        "head": textwrap.fill(head, 120, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False),
        "file": file_name,
        "cache": _cache(cache or CacheConfig()),
        "light_cpus": light,
        "concurrent_batches": max(4, 2 * max(one.replicas for one in tiers)),
    }
    parts = [_filled("server.yaml", server)]
    generating = sum(one.replicas for s, one in zip(subjects, tiers, strict=True) if s.card.task in GENERATING_TASKS)
    for subject, one in zip(subjects, tiers, strict=True):
        parts.append(_filled("model.yaml", _values(subject, one, machine, light, heavy, generating)))
    return "\n".join(parts)


def _tiers(subject: Subject, machine: Machine, models: int, place: int) -> Tiers:
    return _on_gpus(machine.gpus, models, place) if machine.gpus else _on_cores(subject, machine, models)


def _on_gpus(gpus: int, models: int, place: int) -> Tiers:
    """Each model has GPUs of its own; where there are too few, as many models share each as must.

    Every GPU is in use, so a new replica has room only where an old one has stopped.
    """
    if models > gpus:
        return Tiers(1, 1, 2, math.floor(100 / math.ceil(models / gpus)) / 100, 0)
    replicas = gpus // models + (place < gpus % models)
    return Tiers(replicas, 1, 2 * replicas, 1, 0)


def _on_cores(subject: Subject, machine: Machine, models: int) -> Tiers:
    cores = max(1, machine.cores // models)
    room = MEMORY_SHARE * machine.memory_bytes / models
    size = 4 * subject.parameters + PROCESS_BYTES
    fitting = int(room // size)
    if not fitting:
        raise ConfigError(
            f"{subject.config.name}: a replica takes some {size / 1e9:.1f} GB of memory on CPU, and this machine has "
            f"{room / 1e9:.1f} GB for each of {models} models; serve fewer, or on GPUs (--gpus)"
        )
    surge = 50 if fitting > 1 else 0
    replicas = min(cores, MOST_CPU_REPLICAS, fitting if not surge else max(1, 2 * fitting // 3))
    return Tiers(replicas, max(1, cores // replicas), 2 if models <= machine.cores else 1, 0, surge)


def _shares(tiers: Sequence[Tiers], machine: Machine) -> tuple[float, float]:
    """Cores to reserve for each light replica and each model replica, so that a roll-out of any one model has room."""
    if machine.gpus:
        return 0.5, 1.0
    lights = 1 + sum(one.tokenizers for one in tiers)
    lights += max(1, *(one.surging(one.tokenizers) for one in tiers))  # 1 of the ingress
    light = min(LIGHT_CPUS, math.floor(40 * machine.cores / lights) / 100)
    replicas = sum(one.replicas for one in tiers) + max(one.surging(one.replicas) for one in tiers)
    heavy = (machine.cores - 0.01 - light * lights) / replicas  # 0.01, because these numbers are rounded in sums
    return light, math.floor(10 * heavy) / 10 if heavy >= 0.1 else math.floor(100 * heavy) / 100


# --- the text


def _values(
    subject: Subject, tiers: Tiers, machine: Machine, light: float, heavy: float, generating: int
) -> Mapping[str, Any]:
    config, card = subject.config, subject.card
    own = config.model_dump(exclude_defaults=True)
    device = "cuda" if machine.gpus and config.device == "auto" else config.device
    shown = {"name", "source", "revision", "task", "device", "dtype", "num_threads", "tokenizer_threads", "long_texts"}
    more = {key: value for key, value in own.items() if key not in shown}
    if 0 < tiers.gpus < 1:
        more.setdefault("memory_fraction", tiers.gpus)
    return {
        "name": config.name,
        "source": config.source,
        "revision": f"revision: {config.revision}" if config.revision else "# revision: <40-hex commit>",
        "task": card.task,
        "device": device,
        "dtype": config.dtype,
        "threads": tiers.threads if "num_threads" not in own else config.num_threads,
        "tokenizer_threads": config.tokenizer_threads,
        "long_texts": card.long_texts,
        "more": _yaml(more) if more else "",
        "light_cpus": light,
        "tokenizers": tiers.tokenizers,
        "surge": tiers.surge,
        "cpus": heavy,
        "gpus": tiers.gpus,
        "replicas": tiers.replicas,
        "settings": "\n".join(_settings(card, machine, generating)),
    }


def _settings(card: ModelCard, machine: Machine, generating: int) -> Iterator[str]:
    if card.task in GENERATING_TASKS:
        kv_tokens: Any = "null" if machine.gpus or generating <= ALONE_GENERATING else KV_TOKENS
        yield _setting("max_kv_tokens", kv_tokens, "tokens with keys and values in memory; null: what suits the device")
        yield _setting("max_generated_sequences", 64, "answers under way in a replica; further ones wait")
        yield _setting("prefill_tokens", 512, "prompt tokens between two steps of answers under way")
    else:
        tokens: Any = "null" if machine.gpus else max(CPU_BATCH_TOKENS, card.max_input_tokens)
        yield _setting("max_batch_tokens", tokens, "tokens in one forward pass; null: what suits the device")
        yield _setting("max_batch_sequences", 512, "sequences in one forward pass")
    yield _setting("max_queued_tokens", 262144, "tokens waiting in a replica; beyond it 429")
    yield _setting("max_forward_s", 30.0, "seconds after which a forward pass hangs, unless others take long")


def _setting(key: str, value: object, comment: str) -> str:
    return f"{f'          {key}: {value}':<{COMMENT_COLUMN}}# {comment}"


def _cache(cache: CacheConfig) -> str:
    root = f"        root: {cache.root}"
    more = cache.model_dump(exclude_defaults=True, exclude={"root"})
    line = f"{root:<{COMMENT_COLUMN}}# node-local; `~` and $VARIABLES are expanded on each node"
    return f"{line}\n{_yaml(more)}" if more else line


def _yaml(values: Mapping[str, Any]) -> str:
    return textwrap.indent(yaml.safe_dump(values, sort_keys=False), " " * 8).rstrip()


def _filled(name: str, values: Mapping[str, Any]) -> str:
    """A template with its values, and the comments of the lines that have some in one column."""
    template = resources.files(__package__).joinpath("templates", name).read_text("utf-8")
    lines = [_line(line, values) for line in template.split("\n")]
    return "\n".join(line for line in lines if line is not None)


def _line(line: str, values: Mapping[str, Any]) -> str | None:
    """None for a line of nothing but an empty value."""
    filled = Template(line).substitute(values)
    if not filled.strip():
        return filled if not line.strip() else None
    key, _, comment = filled.rpartition(" # ")
    is_changed = filled != line and " # " in line and key.strip()
    return f"{key.rstrip() + '  ':<{COMMENT_COLUMN}}# {comment}" if is_changed else filled

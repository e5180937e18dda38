"""Deploys against a server under load: every answer right, none lost, and the old version there until the new one is.

Each answer tells the revision that made it, and is compared with what transformers computes from that revision's files.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from serve_app.cli.dashboard import Dashboard
from tests.cluster.checked_load import Ask, Load, checked_load
from tests.cluster.rollout_models import (
    TEXTS,
    damaged,
    generated,
    not_numbers,
    unsupported,
    vectors,
    with_other_vocabulary,
    write_decoder,
    write_encoder,
)
from tests.live import Live, models_of, served

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

NEW_TOKENS = 24
Config = dict[str, Any]
MODEL, OTHER, WRITER = "target", "other", "writer"


@dataclass
class Site:
    """A server, what it is configured to be, and the right answers of every revision that it may serve."""

    live: Live
    folder: Path
    config: Config
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    """By the folder that a revision was made from, which `label` tells."""
    answers: dict[str, list[str]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    """Revision → folder."""

    def deploy(self, change: Callable[[Config], None], *options: str) -> Any:
        """`serve-app deploy` of the configuration with a change, which is kept if it succeeds."""
        config = copy.deepcopy(self.config)
        change(config)
        file = self.folder / "next.yaml"
        file.write_text(yaml.safe_dump(config))
        done = self.live.serve_app("deploy", str(file), *options)
        if done.returncode == 0:
            self.config = config
        return done

    def embed(self, model: str, long_texts: str = "truncate") -> Ask:
        async def ask(client: httpx.AsyncClient, number: int) -> str:
            index = number % len(TEXTS)
            body = {"inputs": TEXTS[index], "parameters": {"long_texts": long_texts}}
            answer = await client.post(f"/models/{model}", json=body)
            answer.raise_for_status()
            revision = answer.headers["x-model-revision"]
            vector = np.array(answer.json(), np.float32).reshape(-1)
            if long_texts == "truncate" or index != 4:
                right = self.right_vectors(model, revision)[index]
                assert np.abs(vector - right).max() < 1e-3, f"{model} {revision}: text {index} has another vector"
            return revision

        return ask

    def right_vectors(self, model: str, revision: str) -> np.ndarray:
        return self.vectors[self.revisions[revision]]

    async def write(self, client: httpx.AsyncClient, number: int) -> str:
        """A whole answer, and every other time one in pieces."""
        index = number % 3
        body = {"model": WRITER, "prompt": TEXTS[index], "max_tokens": NEW_TOKENS, "temperature": 0}
        if number % 2:
            answer = await client.post("/v1/completions", json=body)
            answer.raise_for_status()
            text, revision = answer.json()["choices"][0]["text"], answer.headers["x-model-revision"]
        else:
            text = ""
            async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                if answer.is_error:
                    await answer.aread()
                answer.raise_for_status()
                revision = answer.headers["x-model-revision"]
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        told = yaml.safe_load(line.removeprefix("data: "))
                        assert "choices" in told, line
                        text += "".join(choice["text"] for choice in told["choices"])
        right = self.answers[self.revisions[revision]][index]
        assert text == right, f"{revision}: {text!r} and not {right!r}"
        return revision

    def details(self, application: str) -> Any:
        """Serve's own account of an application."""
        return Dashboard(self.live.dashboard).details()["applications"][application]

    def info(self, model: str) -> Any:
        return httpx.get(f"{self.live.base_url}/models/{model}/info", timeout=30, trust_env=False).json()

    def post(self, model: str) -> httpx.Response:
        return httpx.post(
            f"{self.live.base_url}/models/{model}/embed", json={"inputs": "a"}, timeout=60, trust_env=False
        )

    def ask_when_known(self, model: str) -> httpx.Response:
        """An answer of a model that has just been deployed: ingress replicas look every two seconds."""
        self.status_of_embed(model, until=200)
        return self.post(model)

    def status_of_embed(self, model: str, until: int) -> int:
        deadline = time.monotonic() + 20
        while (status := self.post(model).status_code) != until and time.monotonic() < deadline:
            time.sleep(0.5)
        return status

    @contextmanager
    def load(self) -> Iterator[Load]:
        asks = {
            MODEL: self.embed(MODEL),
            f"{MODEL} in windows": self.embed(MODEL, "windows"),
            OTHER: self.embed(OTHER),
            WRITER: self.write,
        }
        with checked_load(self.live.base_url, asks, per_second=8) as load:
            time.sleep(1.5)
            yield load
            time.sleep(1.5)


def use(name: str, source: Path | str) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        for model in models_of(config):
            if model["name"] == name:
                model["source"] = str(source)

    return change


def entry(name: str, source: Path, cache: Any) -> Config:
    """The application of a model."""
    light = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.05}}
    return {
        "name": name,
        "route_prefix": None,
        "import_path": "serve_app.app:build_model",
        "args": {"cache": cache, "model": {"name": name, "source": str(source)}},
        "deployments": [{"name": f"{name}-tokenizer", **light}, {"name": f"{name}-model", **light}],
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    first = write_encoder(root / "first", seed=1)
    writer = write_decoder(root / "writer", seed=1)
    return {
        "first": first,
        "second": write_encoder(root / "second", seed=2),
        "renumbered": with_other_vocabulary(first, root / "renumbered"),
        "damaged weights": damaged(first, root / "damaged-weights", "model.safetensors"),
        "weights that are no numbers": not_numbers(first, root / "not-numbers"),
        "damaged tokenizer": damaged(first, root / "damaged-tokenizer", "tokenizer.json"),
        "third": write_encoder(root / "third", seed=3),
        "unsupported": unsupported(first, root / "unsupported"),
        "writer": writer,
        "next writer": write_decoder(root / "next-writer", seed=2),
    }


@pytest.fixture(scope="module")
def site(folders: dict[str, Path]) -> Iterator[Site]:
    kept: Config = {}

    def models(config: Config) -> None:
        cache = config["applications"][0]["args"]["cache"]
        ingress = config["applications"][0]
        ingress["deployments"][0]["ray_actor_options"]["num_cpus"] = 0.05
        sources = {MODEL: "first", OTHER: "second", WRITER: "writer"}
        config["applications"] = [ingress, *(entry(name, folders[key], cache) for name, key in sources.items())]
        kept.update(copy.deepcopy(config))

    with served(models) as live:
        site = Site(live, live.folder, kept)
        for key in ("first", "second", "renumbered"):
            site.vectors[key] = vectors(folders[key])
        for key in ("writer", "next writer"):
            site.answers[key] = generated(folders[key], TEXTS[:3], NEW_TOKENS)
        for key in (*site.vectors, *site.answers):
            site.revisions[revision_of(folders[key])] = key
        yield site


def revision_of(folder: Path) -> str:
    """As the cache names what a folder holds."""
    from serve_app.cache.hub import Hub
    from serve_app.cache.resolve import resolve
    from serve_app.config import ModelConfig

    return resolve(ModelConfig(name="m", source=str(folder)), Hub(timeout_s=10.0)).revision


def assert_nothing_went_wrong(load: Load) -> None:
    assert load.since(0.0) == {}
    assert all(len(seen.answered) > 10 for seen in load.streams.values())


def test_a_version_with_another_vocabulary_takes_over_without_a_wrong_answer(
    site: Site, folders: dict[str, Path]
) -> None:
    np.testing.assert_allclose(site.vectors["renumbered"], site.vectors["first"], atol=1e-4)
    with site.load() as load:
        done = site.deploy(use(MODEL, folders["renumbered"]))
        over = time.monotonic()
        assert done.returncode == 0, done.stdout + done.stderr
    assert_nothing_went_wrong(load)
    assert {site.revisions[r] for r in load.streams[MODEL].versions_since(0.0)} == {"first", "renumbered"}
    assert {site.revisions[r] for r in load.streams[MODEL].versions_since(over + 1.0)} == {"renumbered"}


def test_a_model_that_generates_changes_without_a_wrong_or_a_cut_answer(site: Site, folders: dict[str, Path]) -> None:
    with site.load() as load:
        done = site.deploy(use(WRITER, folders["next writer"]))
        assert done.returncode == 0, done.stdout + done.stderr
    assert_nothing_went_wrong(load)
    assert {site.revisions[r] for r in load.streams[WRITER].versions_since(0.0)} == {"writer", "next writer"}


def cannot_be_stored(config: Config, folder: Path) -> None:
    use(MODEL, folder)(config)
    for application in config["applications"]:
        if application["name"] == MODEL:
            application["args"]["cache"] = {**application["args"]["cache"], "min_free_bytes": 10**18}


BAD = {
    "damaged weights": "the weights in",
    "weights that are no numbers": "not finite",
}
FOUND_BY_CHECK = {
    "damaged tokenizer": "tokenizer.json cannot be read as JSON",
    "unsupported": "modules.json names some.where.Mystery",
}


def replicas_of(site: Site, application: str) -> set[str]:
    """Ids of the replicas that run."""
    return {
        replica["replica_id"]
        for state in site.details(application)["deployments"].values()
        for replica in state["replicas"]
    }


def assert_a_bad_deploy_is_refused(site: Site, change: Callable[[Config], None], reason: str) -> None:
    """The old version answers all the time and afterwards, no other model is touched, and the reason is told."""
    others = {name: replicas_of(site, name) for name in (OTHER, WRITER, "serve_app")}
    revision = site.info(MODEL)["model_sha"]
    with site.load() as load:
        done = site.deploy(change)
        ready = httpx.get(f"{site.live.base_url}/ready", timeout=30, trust_env=False)
        site.live.wait_until("RUNNING")
    assert done.returncode == 1, done.stdout
    assert reason in done.stderr
    assert "put back" in done.stderr
    assert ready.status_code == httpx.codes.OK, ready.text
    assert_nothing_went_wrong(load)
    assert load.streams[MODEL].versions_since(0.0) == {revision}
    assert site.info(MODEL)["model_sha"] == revision
    assert {name: replicas_of(site, name) for name in others} == others


@pytest.mark.parametrize("kind", BAD)
def test_files_that_cannot_be_served_leave_the_old_version_in_service(
    site: Site, folders: dict[str, Path], kind: str
) -> None:
    assert_a_bad_deploy_is_refused(site, use(MODEL, folders[kind]), BAD[kind])


def test_a_typo_in_a_source_leaves_the_old_version_in_service(site: Site) -> None:
    assert_a_bad_deploy_is_refused(site, use(MODEL, "/no/such/folder"), "/no/such/folder")


def test_a_disk_without_room_leaves_the_old_version_in_service(site: Site, folders: dict[str, Path]) -> None:
    change = partial(cannot_be_stored, folder=folders["third"])
    assert_a_bad_deploy_is_refused(site, change, "must stay free (cache.min_free_bytes)")


@pytest.mark.parametrize("kind", FOUND_BY_CHECK)
def test_what_the_check_would_find_is_harmless_too_where_nobody_checks(
    site: Site, folders: dict[str, Path], kind: str
) -> None:
    """As `serve deploy` sends a file: the replicas' constructors raise, and the new version never begins."""
    revision, config = site.info(MODEL)["model_sha"], copy.deepcopy(site.config)
    use(MODEL, folders[kind])(config)
    dashboard = Dashboard(site.live.dashboard)
    with site.load() as load:
        refused = site.deploy(use(MODEL, folders[kind]))
        dashboard.deploy(config)
        site.live.wait_until("DEPLOY_FAILED", MODEL)
        told = "".join(state["message"] for state in site.details(MODEL)["deployments"].values())
        dashboard.deploy(site.config)
        site.live.wait_until("RUNNING")
    assert FOUND_BY_CHECK[kind] in refused.stderr
    assert FOUND_BY_CHECK[kind] in told
    assert_nothing_went_wrong(load)
    assert load.streams[MODEL].versions_since(0.0) == {revision}


def test_a_roll_out_for_which_no_node_has_room_waits_and_says_so(site: Site) -> None:
    def too_large(config: Config) -> None:
        for deployment in config["applications"][1]["deployments"]:
            deployment["ray_actor_options"] = {"num_cpus": 64}

    with site.load() as load:
        done = site.deploy(too_large, "--timeout", "30")
        assert site.deploy(lambda config: None).returncode == 0
    assert done.returncode == 1
    assert "no node has had room yet (num_cpus 64)" in done.stdout
    assert "the roll-out is not over" in done.stderr.lower()
    assert_nothing_went_wrong(load)


def test_the_right_files_are_served_after_all_these(site: Site, folders: dict[str, Path]) -> None:
    with site.load() as load:
        done = site.deploy(use(MODEL, folders["second"]))
        over = time.monotonic()
        assert done.returncode == 0, done.stdout + done.stderr
    assert_nothing_went_wrong(load)
    assert {site.revisions[r] for r in load.streams[MODEL].versions_since(over + 1.0)} == {"second"}


def test_a_model_comes_and_goes_beside_the_others(site: Site, folders: dict[str, Path]) -> None:
    others = {name: replicas_of(site, name) for name in (MODEL, OTHER, WRITER, "serve_app")}
    added = entry("added", folders["first"], site.config["applications"][0]["args"]["cache"])
    without = copy.deepcopy(site.config)
    with site.load() as load:
        done = site.deploy(lambda config: config["applications"].append(added))
        assert done.returncode == 0, done.stdout + done.stderr
        answer = site.ask_when_known("added")
        assert site.deploy(lambda config: config.update(without)).returncode == 0
        gone = site.status_of_embed("added", until=404)
    assert_nothing_went_wrong(load)
    assert answer.headers["x-model-revision"] in site.revisions
    assert gone == httpx.codes.NOT_FOUND
    assert {name: replicas_of(site, name) for name in others} == others


def test_a_model_that_is_added_wrong_harms_no_other(site: Site) -> None:
    cache, without = site.config["applications"][0]["args"]["cache"], copy.deepcopy(site.config)
    with site.load() as load:
        done = site.deploy(lambda config: config["applications"].append(entry("added", Path("/no/such/folder"), cache)))
        ready = httpx.get(f"{site.live.base_url}/ready", timeout=30, trust_env=False)
        info = httpx.get(f"{site.live.base_url}/info", timeout=30, trust_env=False).json()
        assert site.deploy(lambda config: config.update(without)).returncode == 0
    assert done.returncode == 1
    assert "/no/such/folder" in done.stderr
    assert ready.status_code == httpx.codes.OK
    assert info["starting"] == ["added"]
    assert_nothing_went_wrong(load)


def test_new_args_of_the_ingress_lose_no_request(site: Site) -> None:
    models = {name: replicas_of(site, name) for name in (MODEL, OTHER, WRITER)}
    before = replicas_of(site, "serve_app")

    def other_cache(config: Config) -> None:
        cache = config["applications"][0]["args"]["cache"]
        config["applications"][0]["args"]["cache"] = {**cache, "download_timeout_s": 1800}

    with site.load() as load:
        done = site.deploy(other_cache)
        assert done.returncode == 0, done.stdout + done.stderr
        time.sleep(8)  # in which the old replica drains and ends
    assert_nothing_went_wrong(load)
    assert replicas_of(site, "serve_app").isdisjoint(before)
    assert {name: replicas_of(site, name) for name in models} == models

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from serve_app.cache.manifest import Manifest, Marker, ModelFile, check_content, check_shards, check_size, content_hash
from serve_app.errors import IncompleteModelError

LEADS_OUT = [
    "../x",
    "a/../../x",
    "..",
    "/etc/passwd",
    "//host/share/x",
    "C:/x",
    "c:x",
    "..\\x",
    "a\\..\\..\\x",
    "\\x",
    "a\0b",
    "",
    ".",
]


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def test_marker_survives_json() -> None:
    files = (ModelFile("a", 1, "ff"), ModelFile("b/c", 2, None, "ee"))
    marker = Marker(Manifest("m", "x/y", "0" * 40, "rule", files), "boot", {"a": 5, "b/c": 6})
    assert Marker.from_json(marker.to_json()) == marker
    assert marker.manifest.total_bytes == 3


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 99}', '{"format": 1, "manifest": [{}]}', "null"])
def test_what_is_no_marker_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Marker.from_json(text)


def test_content_check_fills_in_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    known = ModelFile("a", 3, git_blob=git_blob(b"abc"))
    assert check_content(tmp_path, known).sha256 == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize(
    "file",
    [
        ModelFile("a", 3, sha256=hashlib.sha256(b"abd").hexdigest()),
        ModelFile("a", 3, git_blob=git_blob(b"abd")),
    ],
    ids=["sha256", "git"],
)
def test_content_check_finds_a_flipped_byte(tmp_path: Path, file: ModelFile) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    with pytest.raises(IncompleteModelError, match="altered"):
        check_content(tmp_path, file)


def test_size_check_names_the_missing_and_the_truncated_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    with pytest.raises(IncompleteModelError, match="a has 3 bytes instead of 4"):
        check_size(tmp_path, ModelFile("a", 4))
    with pytest.raises(IncompleteModelError, match="b is missing"):
        check_size(tmp_path, ModelFile("b", 4))


def test_content_hash_changes_with_name_size_and_content() -> None:
    files = [ModelFile("a", 1, "00"), ModelFile("b", 1, "00"), ModelFile("a", 2, "00"), ModelFile("a", 1, "01")]
    assert len({content_hash([file]) for file in files}) == 4


def test_a_shard_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(IncompleteModelError, match="model-00001-of-00002"):
        check_shards(tmp_path, [index.name])
    check_shards(tmp_path, [index.name, "model-00001-of-00002.safetensors"])


@pytest.mark.parametrize(
    "text",
    ["[]", "{", '{"weight_map": ["a"]}', '{"weight_map": {"w": 1, "v": "a"}}', '{"weight_map": {"w": ["a"]}}', "\xff"],
)
def test_what_is_no_index_of_weights_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(IncompleteModelError, match=r"model\.safetensors\.index\.json: this is no index of weights"):
        check_shards(tmp_path, ["model.safetensors.index.json"])


@pytest.mark.parametrize("path", LEADS_OUT)
def test_a_shard_outside_of_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": path}}))
    with pytest.raises(IncompleteModelError, match="is missing"):
        check_shards(tmp_path, ["model.safetensors.index.json"])


@pytest.mark.parametrize("path", LEADS_OUT)
def test_no_manifest_names_a_file_outside_of_its_folder(path: str) -> None:
    with pytest.raises(IncompleteModelError, match="is no path of a file below a model's folder"):
        ModelFile(path, 1)


@pytest.mark.parametrize("path", LEADS_OUT)
def test_no_marker_does(path: str) -> None:
    marker = Marker(Manifest("m", "x/y", "r", "rule", (ModelFile("a", 1, "ff"),)), "boot").to_json()
    with pytest.raises(ValueError, match="not a marker"):
        Marker.from_json(marker.replace('"a"', json.dumps(path)))


@pytest.mark.parametrize("folder", [*LEADS_OUT, "a/b", ".hidden"])
@pytest.mark.parametrize("key", ["name", "revision"])
def test_no_manifest_is_published_outside_of_the_cache(key: str, folder: str) -> None:
    named = {"name": "m", "revision": "r", key: folder}
    with pytest.raises(IncompleteModelError, match="is no"):
        Manifest(source="x/y", selection="rule", files=(), **named)


def test_paths_of_real_models_are_taken() -> None:
    for path in ("config.json", "1_Pooling/config.json", "a..b", "...", "1:2 c", "model-00001-of-00002.safetensors"):
        ModelFile(path, 1)

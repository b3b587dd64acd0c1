"""What push offers to the hub, tried on a fake of the hub's API in a thread; nothing here reaches a network."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from yaml import safe_load

from bench.records.store import append
from bench.run.plan import target_of
from quantize.checkpoint import CARD_NAME, CalibrationFacts, Manifest, SourceFacts, open_checkpoint, seal, verify
from reports.card import card
from tests.builder import Builder

ROOT = Path(__file__).parents[2]
REPOSITORY = "us/Tiny-AWQ"


class Hub(ThreadingHTTPServer):
    """As much of the hub as a push asks for. files: of the pull request; calls: what was asked for, in order."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.files: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.created: dict[str, Any] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Asked(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append(self.path)
        if self.headers.get("Authorization") != "Bearer hf_good" and "validate" not in self.path:
            return self.answer(401, {"error": "Invalid token"})
        if self.path == "/api/validate-yaml":
            found = safe_load(json.loads(body)["content"].split("---")[1])
            wrong = [one for one in ("library_name", "pipeline_tag", "tags", "license") if one not in found]
            return self.answer(400 if wrong else 200, {"errors": [{"message": f"{one} is missing"} for one in wrong]})
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self.answer(200, {"url": f"{self.server.url}/{REPOSITORY}"})
        if self.path.startswith(f"/api/models/{REPOSITORY}/preupload/main"):
            files = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(body)["files"]]
            return self.answer(200, {"files": [{**one, "shouldIgnore": False} for one in files]})
        assert self.path == f"/api/models/{REPOSITORY}/commit/main?create_pr=1", self.path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        place = f"{self.server.url}/{REPOSITORY}"
        urls = {"commitUrl": f"{place}/commit/abc", "pullRequestUrl": f"{place}/discussions/1"}
        return self.answer(200, {**urls, "commitOid": "abc"})

    def answer(self, code: int, data: object) -> None:
        content = json.dumps(data).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small checkpoint with its card, of a local source and a text of one's own."""
    made = tmp_path / "Tiny-AWQ"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(2000))
    (made / "README.md").write_text("---\nlicense: mit\n---\nThe source's.\n")
    (made / "LICENSE").write_text("MIT")
    manifest = Manifest(
        name=made.name,
        base_model="Tiny",
        variant="awq-gemm",
        q_group_size=64,
        source=SourceFacts("folder", "/home/me/secret/Tiny", None, "ff" * 32),
        calibration=CalibrationFacts("/home/me/secret/text.txt", 2, 32, "ee" * 32),
        options={},
        libraries={},
        seconds={},
        created="2025-01-01T00:00:00+00:00",
        weights_bytes=2000,
    )
    seal(made, manifest)
    card(made).write(made)
    (made / ".cache").mkdir()
    (made / ".cache" / "left").write_text("not for others")
    return made


def push(hub: Hub, folder: Path, *more: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    given = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_good",
        "HF_HOME": str(folder.parent / "home"),
        "HF_HUB_OFFLINE": "0",
    }
    program = "import sys; from reports.push import main; sys.exit(main())"
    command = [sys.executable, "-c", program, str(folder), REPOSITORY, *more]
    whole = {**os.environ, **given, **environment}
    return subprocess.run(command, cwd=ROOT, env=whole, capture_output=True, text=True, check=False)


def test_a_pull_request_holds_the_whole_checkpoint_and_no_private_path(hub: Hub, folder: Path, tmp_path: Path) -> None:
    done = push(hub, folder, "--private")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{hub.url}/{REPOSITORY}/discussions/1\n"
    assert hub.calls[0] == "/api/validate-yaml", "bad metadata is found before a repository is made"
    assert (hub.created["organization"], hub.created["name"], hub.created["visibility"]) == (
        "us",
        "Tiny-AWQ",
        "private",
    )
    names = ["LICENSE", "README.md", "config.json", "model.safetensors", "quantable.json"]
    assert sorted(hub.files) == names
    assert not any(b"secret" in content for content in hub.files.values())
    back = tmp_path / "downloaded"
    back.mkdir()
    for name, content in {**hub.files, ".gitattributes": b"*.safetensors lfs"}.items():
        (back / name).write_bytes(content)
    verify(open_checkpoint(back))
    assert open_checkpoint(back).content_sha256 == open_checkpoint(folder).content_sha256


def without_card(folder: Path) -> None:
    (folder / CARD_NAME).write_text("Words.")


def damaged(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(1999) + b"1")


def broken(folder: Path) -> None:
    builder, subject = Builder("Tiny"), target_of(open_checkpoint(folder)).subject
    reference = builder.subject("fp16")
    records = [builder.latency("fp16", subject=reference), builder.latency("awq-gemm", subject=subject)]
    worse = replace(builder.quality("awq-gemm", 900.0), subject=subject)
    append(folder.parent / "records.jsonl", *records, builder.quality("fp16", 15.0), worse)


def unlicensed(folder: Path) -> None:
    path = folder / CARD_NAME
    path.write_text(path.read_text().replace("license: mit\n", ""))


@pytest.mark.parametrize(
    ("change", "environment", "words"),
    [
        (without_card, {}, "has no card: quantable card"),
        (damaged, {}, "does not match its SHA-256"),
        (broken, {}, "is broken, its perplexity is x60 the reference's"),
        (unlicensed, {}, "license is missing"),
        (Path.stat, {"HF_TOKEN": ""}, "wants a token: run `hf auth login`"),
        (Path.stat, {"HF_TOKEN": "hf_bad"}, "did not take us/Tiny-AWQ"),
        (Path.stat, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        (Path.stat, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 did not take"),
    ],
)
def test_what_cannot_be_offered_is_one_line(
    hub: Hub, folder: Path, change: Callable[[Path], object], environment: dict[str, str], words: str
) -> None:
    change(folder)
    done = push(hub, folder, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert not hub.files

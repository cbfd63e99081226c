"""Uploading to the Hub, against a stand-in for it on loopback."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.tiny import CHECKPOINT, ROOT, TOKENIZER

REPO = "me/capitals"


class Hub(ThreadingHTTPServer):
    """Takes uploads as the Hub does, every file within its commit, and keeps them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.created: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.refuses = False


class Request(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)) or self.chunks()
        if self.server.refuses:
            self.reply(403, {"error": "You do not have the rights to create a model under this namespace"})
        elif self.path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.reply(200, {"url": f"{self.server.url}/{REPO}"})
        elif self.path == f"/api/models/{REPO}/preupload/main":
            paths = [file["path"] for file in json.loads(body)["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            self.reply(200, {"files": [{"path": path, **regular} for path in paths]})
        elif self.path == f"/api/models/{REPO}/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.reply(200, {"commitUrl": f"{self.server.url}/{REPO}/commit/1", "commitOid": "1"})
        else:
            self.reply(404, {"error": self.path})

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            self.reply(200, {"name": "me", "orgs": [{"name": "our-lab"}]})
        else:
            self.reply(404, {"error": "there is nothing yet"})

    def chunks(self) -> bytes:
        """The body of a request of unknown length, which comes in pieces."""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def reply(self, status: int, content: dict) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def run(hub: Hub, *command: str) -> subprocess.CompletedProcess:
    """A Python process that takes the stand-in for the Hub; the endpoint is read when it starts."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_none"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def convert_and_push(hub: Hub, folder: Path) -> subprocess.CompletedProcess:
    files = ["--checkpoint_path", str(CHECKPOINT), "--tokenizer_path", str(TOKENIZER)]
    return run(hub, "convert_checkpoint.py", *files, "--output_dir", str(folder), "--push_to_hub", REPO)


def test_the_converter_uploads_the_folder_as_it_is_to_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    done = convert_and_push(hub, tmp_path / "capitals")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(f"pushed        {hub.url}/{REPO}")
    assert [repo["visibility"] for repo in hub.created] == ["private"]
    assert hub.files == {file.name: file.read_bytes() for file in (tmp_path / "capitals").iterdir()}


def test_a_refusal_is_reported_and_leaves_the_folder(hub: Hub, tmp_path: Path) -> None:
    hub.refuses = True
    done = convert_and_push(hub, tmp_path / "capitals")
    assert done.returncode == 2
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"convert_checkpoint.py: error: {tmp_path}/capitals is complete, but was not pushed")
    assert "do not have the rights" in message
    assert (tmp_path / "capitals" / "model.safetensors").exists()


PUSH = f"""\
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
for auto_class in (AutoModelForCausalLM, AutoTokenizer):
    auto_class.from_pretrained(sys.argv[1], trust_remote_code=True).push_to_hub("{REPO}")
"""


def test_push_to_hub_of_the_loaded_objects_uploads_what_loads_without_this_package(hub: Hub, capitals: Path) -> None:
    done = run(hub, "-P", "-c", PUSH, str(capitals))
    assert done.returncode == 0, done.stderr
    assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_custom_gpt.py"} <= set(hub.files)
    assert set(hub.files) <= {".gitattributes", *(file.name for file in capitals.iterdir())}
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja", "modeling_custom_gpt.py"):
        assert hub.files[name] == (capitals / name).read_bytes()

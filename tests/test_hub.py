"""--push_to_hub against a local stand-in of the hub: what is uploaded, when, and what a user sees where it fails."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NAME = "ann/kitchen-recommender"


class StandIn(ThreadingHTTPServer):
    """The few calls of the hub that an upload makes; keeps what was asked and what was committed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Calls)
        self.asked: list[str] = []
        self.created: dict = {}
        self.files: dict[str, bytes] = {}
        self.refuses_commits = False

    @property
    def endpoint(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host}:{port}"


class Calls(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def answer(self, code: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if "auth-check" in self.path and self.headers.get("Authorization") != "Bearer hf_ann":
            self.answer(403, {"error": "You may not write here."})
        else:
            self.answer(200, {"id": NAME, "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        self.server.asked.append(self.path)
        length = self.headers["Content-Length"]
        body = self.rfile.read(int(length)) if length else b"".join(self.chunks())
        if self.headers.get("Authorization") != "Bearer hf_ann":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self.answer(200, {"url": f"{self.server.endpoint}/{NAME}"})
        elif self.path == "/api/validate-yaml":
            text = json.loads(body)["content"]
            assert isinstance(yaml.safe_load(text.split("---")[1]), dict)
            self.answer(200, {"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            self.answer(200, {"files": files})
        elif self.server.refuses_commits:
            self.answer(403, {"error": "Storage limit reached."})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            oid = "1" * 40
            url = f"{self.server.endpoint}/{NAME}/commit/{oid}"
            self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()


@pytest.fixture
def hub():
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def run(hub: StandIn, arguments: list[str], folder: Path, token: str = "hf_ann") -> tuple[int, str]:
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder / "hf"),
    }
    done = subprocess.run(
        [sys.executable, "sft.py", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stderr


def test_a_run_uploads_its_final_checkpoint_and_nothing_else(hub, flags, tmp_path):
    code, log = run(hub, flags(push_to_hub=NAME), tmp_path)
    assert code == 0, log
    assert f"Uploaded {tmp_path / 'run' / 'final_checkpoint'} to {hub.endpoint}/{NAME}" in log
    assert hub.asked.index("/api/repos/create") < hub.asked.index(f"/api/models/{NAME}/preupload/main")
    assert (hub.created["organization"], hub.created["name"]) == ("ann", "kitchen-recommender")
    assert hub.created.get("private") is True or hub.created.get("visibility") == "private"
    final = tmp_path / "run" / "final_checkpoint"
    assert hub.files == {path.name: path.read_bytes() for path in final.iterdir()}
    front = yaml.safe_load(hub.files["README.md"].decode().split("---")[1])
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation"
    assert "semantic-ids" in front["tags"]


def test_without_the_flag_and_with_check_nothing_is_asked(hub, flags, tmp_path):
    assert run(hub, flags(max_steps=1, eval_steps=1, save_steps=1), tmp_path)[0] == 0
    assert run(hub, flags(push_to_hub=NAME, check=True, output_dir=tmp_path / "other"), tmp_path)[0] == 0
    assert hub.asked == []


@pytest.mark.parametrize(("name", "token"), [(NAME, "hf_someone_else"), ("a/b/c", "hf_ann"), ("../etc", "hf_ann")])
def test_a_hub_that_does_not_let_us_write_is_one_line_before_the_training(hub, flags, tmp_path, name, token):
    code, log = run(hub, flags(push_to_hub=name), tmp_path, token)
    assert code == 2
    assert log.splitlines()[-1].startswith(f"sft.py: --push_to_hub {name}: cannot be opened (")
    assert "hf auth login, or the variable HF_TOKEN" in log.splitlines()[-1]
    assert "Traceback" not in log
    assert not (tmp_path / "run").exists()


def test_an_upload_that_fails_leaves_the_model_whole_and_says_how_to_go_on(hub, flags, tmp_path):
    hub.refuses_commits = True
    code, log = run(hub, flags(push_to_hub=NAME), tmp_path)
    final = tmp_path / "run" / "final_checkpoint"
    assert code == 2
    assert log.splitlines()[-1].endswith(f"{final} is whole: try again with hf upload {NAME} {final}")
    assert "Storage limit reached" in log.splitlines()[-1]
    assert "Traceback" not in log
    assert (final / "model.safetensors").exists()
    assert not hub.files

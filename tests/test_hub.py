"""A zoo read by its id, by the real client, from a server on this machine."""

import hashlib
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The two requests that reading a file takes; everything else is not found."""

    folder: Path
    served: list[str]

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, *, with_body):
        prefix, _, name = self.path.partition("/resolve/main/")
        if not name:
            prefix, _, name = self.path.partition(f"/resolve/{COMMIT}/")
        file = self.folder / name
        if prefix != "/datasets/ModelZoos/tiny" or not file.is_file():
            self.send_response(404)
            self.send_header(
                "X-Error-Code", "EntryNotFound" if prefix == "/datasets/ModelZoos/tiny" else "RepoNotFound"
            )
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.served.append(name)
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tiny_zoo):
    handler = type("TinyHub", (Hub,), {"folder": tiny_zoo, "served": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler.served
    server.shutdown()
    thread.join()
    server.server_close()


def ask(code, endpoint, home):
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PATH": "/usr/bin:/bin"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_an_id_opens_and_only_what_is_needed_is_fetched(hub, tmp_path):
    endpoint, served = hub
    code = "import vitzoo_hf as vz; zoo = vz.Zoo('ModelZoos/tiny'); print(len(zoo), len(zoo.filter(head='mlp')))"
    result = ask(code, endpoint, tmp_path)
    assert result.stdout == "18 8\n", result.stderr
    assert not [name for name in served if name.startswith("weights/")]
    code = (
        "import vitzoo_hf as vz; zoo = vz.Zoo('ModelZoos/tiny'); print(zoo.model(zoo.model_ids[0]).head.out_features)"
    )
    assert ask(code, endpoint, tmp_path).stdout == "10\n"


def test_an_unknown_id_is_one_line(hub, tmp_path):
    code = "import vitzoo_hf as vz\ntry: vz.Zoo('ModelZoos/none')\nexcept vz.ZooError as error: print(error)"
    result = ask(code, hub[0], tmp_path)
    assert result.stdout.startswith("cannot get zoo.json of 'ModelZoos/none', which is no folder here")
    assert result.stdout.count("\n") == 1

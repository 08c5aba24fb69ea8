"""Hubs on this machine: one that models are fetched from, one that takes uploads. They keep a
record of what they were asked for.
"""

from __future__ import annotations

import hashlib
import json
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

import pytest

COMMIT = "c0ffee" + 34 * "0"


class FakeHub:
    """Serves a folder as the model `name`. Used as a context manager."""

    def __init__(self, name: str, folder: Path) -> None:
        self.asked: list[str] = []
        """Methods and paths."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        asked, api, place = self.asked, f"/api/models/{name}", f"/{name}/resolve/{COMMIT}/"

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                asked.append(f"{self.command} {path}")
                if path == f"{api}/revision/main":
                    siblings = [{"rfilename": file} for file in files]
                    self._answer(
                        json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
                    )
                elif path == f"{api}/tree/{COMMIT}":
                    entries = [
                        {
                            "type": "file",
                            "path": file,
                            "size": len(content),
                            "oid": _digest(content),
                        }
                        for file, content in files.items()
                    ]
                    self._answer(json.dumps(entries).encode())
                elif path.startswith(place) and path.removeprefix(place) in files:
                    self._answer(files[path.removeprefix(place)])
                else:
                    self._answer(b"{}", 404)

            do_HEAD = do_GET

            def _answer(self, content: bytes, code: int = 200) -> None:
                self.send_response(code)
                headers = {
                    "Content-Length": len(content),
                    "ETag": f'"{_digest(content)}"',
                    "X-Repo-Commit": COMMIT,
                }
                headers |= {"X-Error-Code": "RepoNotFound"} if code == 404 else {}
                for header, value in headers.items():
                    self.send_header(header, str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, format: str, *arguments: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def take(self) -> list[str]:
        """Return what it was asked for since the last time."""
        asked = self.asked.copy()
        self.asked.clear()
        return asked


class UploadHub:
    """A hub that takes commits. Used as a context manager; see `use_hub`."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.files: dict[str, bytes] = {}
        """Everything that was committed, by path."""
        self.commits: list[list[str]] = []
        """The paths of each commit."""
        self.created: list[dict[str, object]] = []
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self.path.partition("?")[0].endswith("/tree/main"):
                    self._answer([
                        {"type": "file", "path": path, "size": len(data), "oid": _digest(data)}
                        for path, data in hub.files.items()
                    ])  # fmt: skip
                else:
                    self._answer({"error": f"not a path of this hub: {self.path}"}, 404)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.tokens.add(self.headers.get("Authorization"))
                path = self.path.partition("?")[0]
                if refuses and path.endswith("/commit/main"):
                    told = f"{self.headers['Authorization']} may not write"
                    self._answer({"error": told}, 403)
                elif path == "/api/repos/create":
                    asked = json.loads(body)
                    hub.created.append(asked)
                    self._answer({"url": f"{hub.url}/{asked['organization']}/{asked['name']}"})
                elif path == "/api/validate-yaml":
                    self._answer({"errors": [], "warnings": []})
                elif path.endswith("/preupload/main"):
                    facts = {"uploadMode": "regular", "shouldIgnore": False}
                    files = [{"path": one["path"], **facts} for one in json.loads(body)["files"]]
                    self._answer({"files": files})
                elif path.endswith("/commit/main"):
                    lines = [json.loads(line) for line in body.splitlines()]
                    added = [line["value"] for line in lines if line["key"] == "file"]
                    hub.files |= {one["path"]: b64decode(one["content"]) for one in added}
                    for line in lines:
                        if line["key"] == "deletedFile":
                            del hub.files[line["value"]["path"]]
                    hub.commits.append([one["path"] for one in added])
                    repo = path.removeprefix("/api/models/").removesuffix("/commit/main")
                    address = f"{hub.url}/{repo}/commit/{COMMIT}"
                    self._answer({"commitUrl": address, "commitOid": COMMIT, "success": True})
                else:
                    self._answer({"error": f"not a path of this hub: {path}"}, 404)

            def _answer(self, content: object, code: int = 200) -> None:
                data = json.dumps(content).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *arguments: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> UploadHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def use_hub(patch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Have this process ask the hub at `url`, and keep its files in `cache`."""
    from huggingface_hub import constants

    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)


def _digest(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()

"""A hub on this machine: it makes repositories, takes commits of small files, and can refuse."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What the hub was sent. token: the one that may write."""

    token: str
    address: str = ""
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does. hub: set by fake_hub, which makes a class of its own for each."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(200 if self.path.startswith("/api/models/") else 404, {"id": "me/it", "sha": "0" * 40})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.read_body()
        self.hub.requests.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.answer(401, {"error": f"no such user: {self.headers.get('Authorization')}"})
        elif self.path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told.get('organization', 'me')}/{told['name']}" if "/" not in told["name"] else told["name"]
            self.hub.repositories[name] = told
            self.answer(200, {"url": f"{self.hub.address}/{name}", "id": name, "name": name})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.answer(200, {"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            address = f"{self.hub.address}/me/it/commit/{'1' * 40}"
            self.answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": address})
        else:
            self.answer(200, {})

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, told: dict[str, Any]) -> None:
        text = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def fake_hub(token: str) -> Iterator[Hub]:
    """Serves on 127.0.0.1 until the block ends."""
    hub = Hub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HandlerOfHub", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()

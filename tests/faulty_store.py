"""An object store on loopback that speaks as much of S3 as reading needs, with faults on demand."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BUCKET = "bucket"
ANSWERS = {
    "SlowDown": 503,
    "ServiceUnavailable": 503,
    "InternalError": 500,
    "RequestTimeout": 400,
    "AccessDenied": 403,
    "InvalidAccessKeyId": 403,
    "SignatureDoesNotMatch": 403,
    "ExpiredToken": 400,
    "NoSuchKey": 404,
    "NoSuchBucket": 404,
    "InvalidRequest": 400,
}
"""Status of each error that is answered properly; other faults are `BREAKS`."""
BREAKS = ("stall", "silence", "reset", "truncate", "html", "other", "trickle")


@dataclass
class Fault:
    """What happens to requests of objects whose names end in ``name``, so many ``times``, or for so
    many ``seconds`` since the first of them."""

    name: str
    kind: str
    times: float = float("inf")
    seconds: float = float("inf")
    began: float | None = field(default=None, init=False)

    def strikes(self) -> bool:
        """Whether it is this request's turn."""
        now = time.monotonic()
        self.began = now if self.began is None else self.began
        self.times -= 1
        return self.times >= 0 and now - self.began <= self.seconds


class FaultyStore:
    """Serves the files of a directory as objects of `BUCKET`."""

    def __init__(self, directory: Path, faults: list[Fault] | None = None) -> None:
        self.directory, self.faults = directory, faults or []
        self.requests: list[tuple[float, str]] = []
        """When each object was asked for."""
        self._lock = threading.Lock()
        self._closing = threading.Event()
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                store._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Of the store in the directory."""
        return f"s3://{BUCKET}/store"

    @property
    def environment(self) -> dict[str, str]:
        """Of processes that read from it."""
        host, port = self._server.server_address[:2]
        return {
            "S3_ENDPOINT_URL": f"http://{host!s}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def count(self, name: str) -> int:
        """How often objects with names that end so were asked for."""
        return sum(path.endswith(name) for _, path in self.requests)

    def close(self) -> None:
        """Answer no longer."""
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.split("?")[0]
        name = path.rsplit("/", 1)[-1]
        with self._lock:
            self.requests.append((time.monotonic(), path))
            fault = next((f for f in self.faults if name.endswith(f.name) and f.strikes()), None)
        file = self.directory / name
        if fault is None:
            if path == f"/{BUCKET}/store/{name}" and file.is_file():
                self._send(request, file.read_bytes())
            else:
                self._refuse(request, "NoSuchKey")
        elif fault.kind in ANSWERS:
            self._refuse(request, fault.kind)
        else:
            with contextlib.suppress(OSError):
                self._break(request, fault.kind, file.read_bytes())
            request.close_connection = True

    def _send(self, request: BaseHTTPRequestHandler, body: bytes, status: int = 200) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("ETag", '"0"')
        request.end_headers()
        request.wfile.write(body)

    def _refuse(self, request: BaseHTTPRequestHandler, code: str) -> None:
        text = (
            f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>of a test</Message></Error>"
        )
        self._send(request, text.encode(), ANSWERS[code])

    def _break(self, request: BaseHTTPRequestHandler, kind: str, body: bytes) -> None:
        if kind == "silence":
            self._closing.wait()
        elif kind == "html":
            # As a gateway answers.
            self._send(request, b"<html>Bad Gateway</html>", 502)
        elif kind == "other":
            self._send(request, bytes(len(body)))
        elif kind == "trickle":
            request.send_response(200)
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            for start in range(0, len(body), max(1, len(body) // 10)):
                request.wfile.write(body[start : start + max(1, len(body) // 10)])
                request.wfile.flush()
                self._closing.wait(0.5)
        else:
            request.send_response(200)
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            request.wfile.write(body[: len(body) // 2])
            request.wfile.flush()
            if kind == "stall":
                self._closing.wait()
            elif kind == "reset":
                # Closed with unsent data thrown away: the reader gets ECONNRESET.
                linger = struct.pack("ii", 1, 0)
                request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                request.connection.close()


@contextlib.contextmanager
def faulty_store(directory: Path, *faults: Fault) -> Iterator[FaultyStore]:
    """A store that is closed at the end of the block."""
    store = FaultyStore(directory, list(faults))
    try:
        yield store
    finally:
        store.close()

"""A server on this machine that serves one file, drops connections, stalls, lies, and changes its mind."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CONTENT = random.Random(0).randbytes(300_000)


class Site(ThreadingHTTPServer):
    """One file under every path.

    Attributes:
        content: the file.
        etag: its version; None for a server that names none.
        ranges: whether the server can resume.
        script: what happens to the next requests: a status, a number of bytes (negative) after which the connection
            is dropped, or a function called first.
        stall_after: bytes after which nothing more comes, while this is set.
        asked: (path, Range, If-Range) of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.ranges = CONTENT, '"one"', True
        self.stall_after: int | None = None
        self.script: list[int | Callable[[], None]] = []
        self.asked: list[tuple[str, str | None, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Dropped connections are the point."""


class Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        site = self.server
        asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
        site.asked.append((self.path, asked, condition))
        action = site.script.pop(0) if site.script else 0
        if callable(action):
            action()
            action = 0
        if action > 0:
            self.send_error(action)
            return
        start, content = 0, site.content
        if asked and site.ranges and condition == site.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        if site.etag:
            self.send_header("ETag", site.etag)
        self.end_headers()
        body = content[start:]
        if site.stall_after is not None:
            self.wfile.write(body[: site.stall_after])
            while site.stall_after is not None:
                time.sleep(0.01)
            self.close_connection = True
            return
        self.wfile.write(body[:-action] if action < 0 else body)
        if action < 0:
            self.wfile.flush()
            self.connection.close()

    def log_message(self, *_arguments: Any) -> None:
        """Nothing on the screen."""

"""Many exporters in one process: python many_exporters.py PAGES NODES. Prints its port; ends when stdin does.

PAGES is a JSON file {"pages": [text, ...], "uuids": [text, ...]} of one real exporter, read at several moments. Node i
answers ``/node/i`` with these pages in turn, with device uuids and ranks of its own and one trial for every 128 nodes.
They are packed once at the start: what a scraper costs is measured beside a process that costs little. ``/count`` tells
how many pages were given.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import resource
import sys
from pathlib import Path
from typing import ClassVar

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n%sContent-Length: %d\r\n\r\n"
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


NODES_OF_A_TRIAL = 128
TRIAL_RANK = re.compile(r'trial="[^"]*",rank="(\d+)"')


def answers_of(pages: list[str], uuids: list[str], node: int) -> list[bytes]:
    """A node's answers, whole and packed."""
    trial, place_of_node = divmod(node, NODES_OF_A_TRIAL)

    def renamed(found: re.Match[str]) -> str:
        return f'trial="final-{trial:03}",rank="{place_of_node * len(uuids) + int(found[1])}"'

    answers = []
    own = {uuid: f"GPU-{node:08x}-0000-0000-0000-{place:012x}" for place, uuid in enumerate(uuids)}
    known = re.compile("|".join(map(re.escape, uuids)))
    for page in pages:
        page_of_node = TRIAL_RANK.sub(renamed, known.sub(lambda found: own[found[0]], page))
        body = gzip.compress(page_of_node.encode(), compresslevel=1)
        answers.append(HEAD % (b"Content-Encoding: gzip\r\n", len(body)) + body)
    return answers


class Node(asyncio.Protocol):
    """One connection; requests are small and have no body."""

    answers: ClassVar[list[list[bytes]]] = []
    given: ClassVar[list[int]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.head = transport, b""

    def data_received(self, data: bytes) -> None:
        self.head += data
        while b"\r\n\r\n" in self.head:
            head, _, self.head = self.head.partition(b"\r\n\r\n")
            self.transport.write(self.answer(head.split(b" ", 2)[1].partition(b"?")[0]))

    def answer(self, path: bytes) -> bytes:
        if path == b"/count":
            body = str(sum(self.given)).encode()
            return HEAD % (b"", len(body)) + body
        try:
            node = int(path.removeprefix(b"/node/"))
            pages = self.answers[node]
        except (ValueError, IndexError):
            return NOT_FOUND
        self.given[node] += 1
        return pages[(self.given[node] + node) % len(pages)]


async def main(pages_file: Path, n_nodes: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    data = json.loads(pages_file.read_text())
    Node.answers = [answers_of(data["pages"], data["uuids"], node) for node in range(n_nodes)]
    Node.given = [0] * n_nodes
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Node, "127.0.0.1", 0, backlog=n_nodes)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))

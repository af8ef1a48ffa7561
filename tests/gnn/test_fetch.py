"""Downloads, against a server on this machine that drops connections, lies, and changes its mind."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import random
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from wattier_gnn import fetch as fetching
from wattier_gnn.datasets import READERS
from wattier_gnn.datasets.releases import RELEASES, ReleaseFile
from wattier_gnn.fetch import choose_files, fetch, from_elsewhere, readable_folders
from wattier_gnn.structure import DataError

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


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fetching, "FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(fetching, "CHUNK_BYTES", 10_000)
    server = Site()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def release(site: Site, content: bytes = CONTENT, **changes: Any) -> ReleaseFile:
    file = ReleaseFile("a.h5", site.url + "a.h5", len(content), hashlib.md5(content).hexdigest())
    return file._replace(**changes)


def ignore(_name: str, _done: int, _total: int | None) -> None:
    """No progress shown."""


def ranges(site: Site) -> list[str | None]:
    return [asked for _, asked, _ in site.asked]


def test_a_file_is_fetched_once(site: Site, tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    folder = tmp_path / "new" / "folder"
    fetched = fetch(release(site), folder, lambda *progress: told.append(progress))
    assert fetched == (folder / "a.h5", False, "md5")
    assert fetched.path.read_bytes() == CONTENT
    assert told[0] == ("a.h5", 0, len(CONTENT))
    assert told[-1] == ("a.h5", len(CONTENT), len(CONTENT))
    assert [file.name for file in folder.iterdir()] == ["a.h5"]
    assert fetch(release(site), folder, ignore).was_there
    assert len(site.asked) == 1


def test_dropped_connections_are_resumed(site: Site, tmp_path: Path) -> None:
    site.script = [-50_000, -20_000, 503, -120_000]
    assert fetch(release(site), tmp_path, ignore).path.read_bytes() == CONTENT
    assert ranges(site)[0] is None
    assert all(asked is not None for asked in ranges(site)[1:])
    assert len(site.asked) == 5


def test_any_number_of_drops_that_make_progress(site: Site, tmp_path: Path) -> None:
    site.script = [-12_000] * 2 * fetching.ATTEMPTS
    assert fetch(release(site), tmp_path, ignore).path.read_bytes() == CONTENT


def test_another_process_goes_on_where_one_was_killed(site: Site, tmp_path: Path) -> None:
    def die(_name: str, done: int, _total: int | None) -> None:
        if done > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(release(site), tmp_path, die)
    assert not (tmp_path / "a.h5").exists()
    n_bytes = (tmp_path / "a.h5.part").stat().st_size
    assert 100_000 < n_bytes < len(CONTENT)
    assert fetch(release(site), tmp_path, ignore).path.read_bytes() == CONTENT
    assert ranges(site) == [None, f"bytes={n_bytes}-"]


def test_a_process_that_was_killed_leaves_no_file(site: Site, tmp_path: Path) -> None:
    site.stall_after = 150_000
    arguments = f"ReleaseFile('a.h5', {site.url + 'a.h5'!r}, {len(CONTENT)}), Path({str(tmp_path)!r}), print"
    script = f"from pathlib import Path; from wattier_gnn.fetch import *; fetching = fetch({arguments})"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    part = tmp_path / "a.h5.part"
    try:
        wait_until(lambda: part.exists() and part.stat().st_size >= site.stall_after, process)
    finally:
        process.kill()
        process.wait()
        site.stall_after = None
    assert not (tmp_path / "a.h5").exists()
    n_bytes = part.stat().st_size
    assert fetch(release(site), tmp_path, ignore).path.read_bytes() == CONTENT
    assert ranges(site)[-1] == f"bytes={n_bytes}-"


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_all_was_there_but_the_name(site: Site, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fetch(release(site), tmp_path, interrupt)
    (tmp_path / "a.h5.part").write_bytes(CONTENT)
    assert fetch(release(site), tmp_path, ignore).path.read_bytes() == CONTENT
    assert ranges(site)[-1] == f"bytes={len(CONTENT)}-"


def interrupt(_name: str, done: int, _total: int | None) -> None:
    if done:
        raise KeyboardInterrupt


@pytest.mark.parametrize("etag", [None, 'W/"weak"', '"one"'])
def test_a_server_that_cannot_resume(etag: str | None, site: Site, tmp_path: Path) -> None:
    site.ranges, site.etag = False, etag  # type: ignore[assignment]
    site.script = [-50_000, -50_000]
    assert fetch(release(site), tmp_path, ignore).path.read_bytes() == CONTENT
    assert len(site.asked) == 3


def test_a_file_that_changed_meanwhile_is_fetched_anew(site: Site, tmp_path: Path) -> None:
    newer = random.Random(1).randbytes(280_000)

    def change() -> None:
        site.content, site.etag = newer, '"two"'

    site.script = [-50_000, change]
    fetched = fetch(release(site, newer, size_bytes=None), tmp_path, ignore)
    assert fetched.path.read_bytes() == newer


def test_another_address_does_not_continue_a_download(site: Site, tmp_path: Path) -> None:
    site.script = [-50_000, 404]
    with pytest.raises(DataError, match="404"):
        fetch(release(site), tmp_path, ignore)
    assert fetch(release(site, url=site.url + "mirror/a.h5"), tmp_path, ignore).path.read_bytes() == CONTENT
    assert ranges(site)[-1] is None


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_final(status: int, site: Site, tmp_path: Path) -> None:
    site.script = [status]
    with pytest.raises(DataError, match=f"a.h5: the server says {status}"):
        fetch(release(site), tmp_path, ignore)
    assert len(site.asked) == 1
    assert not (tmp_path / "a.h5").exists()


def test_a_broken_server_is_given_up(site: Site, tmp_path: Path) -> None:
    site.script = [500] * 20
    with pytest.raises(DataError, match=f"500 Internal Server Error, {fetching.ATTEMPTS} times in a row"):
        fetch(release(site), tmp_path, ignore)
    assert len(site.asked) == fetching.ATTEMPTS


def test_nobody_listens(site: Site, tmp_path: Path) -> None:
    file = release(site, url="http://127.0.0.1:1/a.h5")
    with pytest.raises(DataError, match="refused"):
        fetch(file, tmp_path, ignore)


def test_a_wrong_checksum_is_no_download(site: Site, tmp_path: Path) -> None:
    site.content = CONTENT[:-1] + b"x"
    with pytest.raises(DataError, match=r"has md5 .* but must be the published a\.h5"):
        fetch(release(site), tmp_path, ignore)
    assert not list(tmp_path.glob("a.h5")) + list(tmp_path.glob("a.h5.part"))
    site.content = CONTENT
    assert fetch(release(site), tmp_path, ignore).path.read_bytes() == CONTENT


def test_a_wrong_size_is_seen_before_the_download(site: Site, tmp_path: Path) -> None:
    site.content = CONTENT[:1000]
    with pytest.raises(DataError, match="offers 1,000 bytes where the release has 300,000"):
        fetch(release(site), tmp_path, ignore)


@pytest.mark.parametrize(
    ("size", "md5", "checked"), [(len(CONTENT), None, "size"), (None, None, None), (None, "right", "md5")]
)
def test_what_is_published_is_checked(
    size: int | None, md5: str | None, checked: str | None, site: Site, tmp_path: Path
) -> None:
    known = hashlib.md5(CONTENT).hexdigest() if md5 else None
    assert fetch(release(site, size_bytes=size, md5=known), tmp_path, ignore).checked == checked


@pytest.mark.parametrize("known", [True, False])
def test_a_differing_file_is_not_overwritten(known: bool, site: Site, tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_bytes(b"mine")
    file = release(site) if known else release(site, size_bytes=None, md5=None)
    with pytest.raises(DataError, match="Move it away"):
        fetch(file, tmp_path, ignore)
    assert (tmp_path / "a.h5").read_bytes() == b"mine"
    assert not site.asked


def test_a_small_disk(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _path: type("usage", (), {"free": 1000}))
    with pytest.raises(DataError, match=r"has 0\.0 GB free, but must have 0\.1 GB for a\.h5"):
        fetch(release(site), tmp_path, ignore)


def test_two_at_once(site: Site, tmp_path: Path) -> None:
    def again(_name: str, done: int, _total: int | None) -> None:
        if done:
            with pytest.raises(DataError, match="is being written by another process"):
                fetch(release(site), tmp_path, ignore)

    assert fetch(release(site), tmp_path, again).path.read_bytes() == CONTENT


def hdf5_bytes() -> bytes:
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        group = file.create_group("1/Geom-m1-i1-c1-opt")
        group["atNUM"], group["atXYZ"] = np.array([1, 1]), np.eye(3)[:2]
        group["ePBE0"], group["pbe0FOR"] = np.array([-30.0]), np.zeros((2, 3))
    return stream.getvalue()


def tar_bytes(members: dict[str, bytes], link: str | None = None) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = tarfile.SYMTYPE, link
            archive.addfile(info)
    return stream.getvalue()


@pytest.mark.parametrize("packed", [lzma.compress(hdf5_bytes()), lzma.compress(tar_bytes({"1000.hdf5": hdf5_bytes()}))])
def test_a_packed_shard_is_unpacked_and_read(packed: bytes, site: Site, tmp_path: Path) -> None:
    site.content = packed
    name = "1000.hdf5"
    fetched = fetch(release(site, packed, name="1000.xz", unpacks_to=name), tmp_path, ignore)
    assert fetched.path == tmp_path / name
    (folder,) = readable_folders(READERS["qm7x"], fetched.path)
    shards = READERS["qm7x"].shards(folder)
    assert [record.key for shard in shards for record in READERS["qm7x"].read(shard)] == ["1/Geom-m1-i1-c1-opt"]
    assert [file.name for file in tmp_path.iterdir()] == [name]  # the packed one has done its work
    assert fetch(release(site, packed, name="1000.xz", unpacks_to=name), tmp_path, ignore).was_there
    assert len(site.asked) == 1


def test_an_archive_of_folders(site: Site, tmp_path: Path) -> None:
    packed = gzip.compress(tar_bytes({"set/train/data.0000.lmdb": b"x", "set/README": b"y"}))
    site.content = packed
    fetched = fetch(release(site, packed, name="set.tar.gz", unpacks_to="set"), tmp_path, ignore)
    assert (tmp_path / "set/set/README").read_bytes() == b"y"
    assert readable_folders(READERS["oc22"], fetched.path) == [tmp_path / "set/set/train"]


@pytest.mark.parametrize(
    "packed",
    [
        lzma.compress(hdf5_bytes())[:-40],
        gzip.compress(hdf5_bytes())[:-40],
        tar_bytes({"a": CONTENT})[:2000],
        tar_bytes({"../outside": b"x"}),
        tar_bytes({"a": b"x"}, link="/etc"),
        tar_bytes({"a": b"x"}, link="a"),
    ],
)
def test_an_archive_that_is_damaged_or_means_harm(packed: bytes, site: Site, tmp_path: Path) -> None:
    site.content, folder = packed, tmp_path / "here"
    file = release(site, packed, name="set.tar", unpacks_to="set")
    with pytest.raises(DataError, match=r"set\.tar"):
        fetch(file, folder, ignore)
    assert [path.name for path in tmp_path.rglob("*")] == ["here", "set.tar"]  # nothing half unpacked, nothing outside
    with pytest.raises(DataError, match=r"set\.tar"):
        fetch(file, folder, ignore)
    assert len(site.asked) == 1


def test_choosing_files() -> None:
    assert [file.name for file in choose_files("qm7x", [])[1]] == [f"{n}000.xz" for n in range(1, 9)]
    assert [file.name for file in choose_files("oc20", ["s2ef_val_ood_*", "*md*"])[1]] == [
        "s2ef_val_ood_ads.tar", "s2ef_val_ood_cat.tar", "s2ef_val_ood_both.tar", "s2ef_md.tar",
    ]  # fmt: skip
    for name, patterns, said in (
        ("ani2x", [], "must be one of ani1x"),
        ("oc20", [], "is released in parts"),
        ("oc20", ["s2ef_train_2m.tar"], "has no file 's2ef_train_2m.tar'"),
    ):
        with pytest.raises(DataError, match=said):
            choose_files(name, patterns)


def test_another_address() -> None:
    files = list(RELEASES["qm7x"].files)
    assert from_elsewhere(files, "http://mirror/x/")[1].url == "http://mirror/x/2000.xz"
    assert from_elsewhere(files[:1], "https://mirror/x")[0].url == "https://mirror/x"
    for chosen, url in ((files, "http://mirror/x"), (files[:1], "file:///etc/passwd"), (files[:1], "ftp://mirror/")):
        with pytest.raises(DataError, match="but must"):
            from_elsewhere(chosen, url)


def test_the_table_of_releases() -> None:
    assert set(RELEASES) == {"ani1x", "qm7x", "oc20", "oc22", "mptrj"}
    for name, release in RELEASES.items():
        reader = READERS[name]
        assert release.name == name
        assert None not in (reader.method, reader.licence, reader.citation)
        assert len({file.name for file in release.files}) == len(release.files)
        for file in release.files:
            assert file.url.startswith("https://")
            assert file.md5 is None or (len(file.md5) == 32 and int(file.md5, 16) > 0)

"""Downloads, against a server on this machine that drops connections, lies, and changes its mind."""

from __future__ import annotations

import hashlib
import lzma
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from download_site import CONTENT, Site

from wattier_gnn import fetch as fetching
from wattier_gnn.datasets.releases import ReleaseFile
from wattier_gnn.fetch import fetch
from wattier_gnn.structure import DataError


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


def test_a_packed_file_is_unpacked_and_removed(site: Site, tmp_path: Path) -> None:
    packed = lzma.compress(CONTENT[:1000])
    site.content = packed
    file = release(site, packed, name="1000.xz", unpacks_to="1000.hdf5")
    fetched = fetch(file, tmp_path, ignore)
    assert fetched == (tmp_path / "1000.hdf5", False, "md5")
    assert [path.name for path in tmp_path.iterdir()] == ["1000.hdf5"]
    assert fetch(file, tmp_path, ignore).was_there
    assert len(site.asked) == 1


def test_a_packed_file_without_checksum_is_unpacked_by_the_next_try(site: Site, tmp_path: Path) -> None:
    (tmp_path / "1000.xz").write_bytes(lzma.compress(CONTENT[:1000]))  # killed after the download
    file = release(site, name="1000.xz", unpacks_to="1000.hdf5", md5=None, size_bytes=None)
    assert fetch(file, tmp_path, ignore).path.read_bytes() == CONTENT[:1000]
    assert not site.asked


def test_a_page_instead_of_a_packed_file_is_fetched_again(site: Site, tmp_path: Path) -> None:
    site.content = b"<html>Sign in to the network</html>"
    file = release(site, name="6000.xz", unpacks_to="6000.hdf5", md5=None, size_bytes=None)
    with pytest.raises(DataError, match=r"starts with b'<html>.*packed with xz .* It was removed; try again"):
        fetch(file, tmp_path, ignore)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".json"]
    site.content, site.etag = lzma.compress(CONTENT[:1000]), '"two"'
    assert fetch(file, tmp_path, ignore).path.read_bytes() == CONTENT[:1000]
    assert [path.name for path in tmp_path.iterdir()] == ["6000.hdf5"]


def test_a_packed_file_that_a_killed_process_had_unpacked_is_removed(site: Site, tmp_path: Path) -> None:
    (tmp_path / "1000.xz").write_bytes(lzma.compress(CONTENT[:1000]))
    (tmp_path / "1000.hdf5").write_bytes(CONTENT[:1000])
    assert fetch(release(site, name="1000.xz", unpacks_to="1000.hdf5"), tmp_path, ignore).was_there
    assert [path.name for path in tmp_path.iterdir()] == ["1000.hdf5"]
    assert not site.asked

"""Pushing to a real Prometheus and a real VictoriaMetrics that go away, die and hang; to a full disk; after SIGKILL.

The minute without a server passes in the background while the other tests run.
"""

import contextlib
import errno
import http.server
import json
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from wattier.ports import free_port
from wattier_telemetry.exporter.metrics import Point
from wattier_telemetry.push import PUSH_METRICS, PushSink, sender
from wattier_telemetry.push.remote_write import Target
from wattier_telemetry.push.spool import Spool, SpoolUnavailable

AWAY_SECONDS = 60
BINARIES = {"remote-write": "prometheus", "victoriametrics": "victoria-metrics"}
HOSTILE = 'say "hi"\\n\n\\ \\" {x="y"} # é 中 \U0001f525 \t'
both_servers = pytest.mark.parametrize("server", list(BINARIES), indirect=True)


def get(url):
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read().decode()


def until(condition, seconds=90.0):
    """Wait for something and say whether it came."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


class Server:
    """A real server on loopback, asked for raw samples in its own way."""

    def __init__(self, kind, folder):
        self.format, self.folder, self.port = kind, folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None
        binary = shutil.which(BINARIES[kind])
        if binary is None:
            pytest.skip(f"{BINARIES[kind]} is not installed (Debian package of that name)")
        folder.mkdir()
        (folder / "empty.yml").write_text("")
        self.command = {
            "remote-write": [
                *(binary, f"--config.file={folder / 'empty.yml'}", f"--storage.tsdb.path={folder / 'data'}"),
                *(f"--web.listen-address=127.0.0.1:{self.port}", "--web.enable-remote-write-receiver"),
            ],
            "victoriametrics": [
                *(binary, f"-storageDataPath={folder / 'data'}", f"-httpListenAddr=127.0.0.1:{self.port}"),
                "-retentionPeriod=1",
            ],
        }[kind]

    def start(self):
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        ready = f"{self.url}/{'-/ready' if self.format == 'remote-write' else 'health'}"

        def up():
            with contextlib.suppress(OSError):
                return bool(get(ready))

        assert until(up), (self.folder / "log").read_text()
        return self

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def series(self, name):
        """Return [(labels, {time in ms: value})] of a metric's raw samples."""
        if self.format == "remote-write":
            query = urllib.parse.urlencode({"query": f"{name}[2h]", "time": time.time() + 60})
            found = json.loads(get(f"{self.url}/api/v1/query?{query}"))["data"]["result"]
            return [(s["metric"], {round(1000 * float(t)): float(v) for t, v in s["values"]}) for s in found]
        get(f"{self.url}/internal/force_flush")
        lines = get(f"{self.url}/api/v1/export?match[]={name}").splitlines()
        return [(s["metric"], dict(zip(s["timestamps"], s["values"], strict=True))) for s in map(json.loads, lines)]

    def samples(self, name):
        return dict(item for _, samples in self.series(name) for item in samples.items())


@pytest.fixture
def server(request, tmp_path):
    one = Server(request.param, tmp_path / "server")
    yield one
    one.kill()


@pytest.fixture
def sink(tmp_path):
    """Make sinks that flush fast, and close them after the test."""
    sinks = []

    def make(url, **options):
        sinks.append(PushSink(url, **{"spool": tmp_path / "spool", "flush_seconds": 0.2, **options}))
        return sinks[-1]

    yield make
    for one in sinks:
        one.close()


class Feed:
    """Feeds a sink and remembers the truth: every sample by its time in ms."""

    def __init__(self, sink, name="m", period_seconds=0.05):
        self.sink, self.name, self.period_seconds = sink, name, period_seconds
        self.truth = {}

    def for_seconds(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.once()
            time.sleep(self.period_seconds)
        return self

    def once(self):
        # Whole milliseconds: what is sent must come back as it is. Eighths are exact in binary and in decimal.
        time_ms, value = time.time_ns() // 1_000_000, len(self.truth) / 8
        self.truth[time_ms] = value
        self.sink.add(time_ms / 1000, [Point(self.name, (("uuid", "u"),), value), *self.sink.points()])


def figure(sink, name, **labels):
    (value,) = [p.value for p in sink.points() if p.name == name and dict(p.labels) == labels]
    return value


def lost(sink):
    return sum(p.value for p in sink.points() if p.name == "wattier_samples_lost_total")


def drained(sink, seconds=90.0):
    return until(lambda: figure(sink, "wattier_spool_batches") == 0, seconds)


def arrived(server, truth):
    """Hold the server to the truth; VictoriaMetrics shows what it has after a second or so."""
    until(lambda: len(server.samples("m")) == len(truth), 60)
    assert server.samples("m") == truth


def settled(look):
    """Return what is seen when it was the same for 1.5 s: VictoriaMetrics shows what it has after a second or so."""
    found, since = look(), time.monotonic()
    while time.monotonic() - since < 1.5:
        time.sleep(0.1)
        if (again := look()) != found:
            found, since = again, time.monotonic()
    return found


class Lines(logging.Handler):
    """Log lines of a background job, which no caplog sees whole."""

    def __init__(self):
        super().__init__()
        self.texts = []
        logging.getLogger("wattier_telemetry").addHandler(self)

    def emit(self, record):
        self.texts.append(record.getMessage())


class Outage(threading.Thread):
    """A server that is not there for the first minute, and a sink that does not know."""

    def __init__(self, kind, folder):
        super().__init__(daemon=True)
        folder.mkdir()
        self.server, self.lines, self.problem = Server(kind, folder / "server"), Lines(), None
        self.sink = PushSink(self.server.url, format=kind, spool=folder / "spool", flush_seconds=2)
        self.feed = Feed(self.sink, period_seconds=0.2)

    def run(self):
        try:
            self.feed.for_seconds(AWAY_SECONDS)
            self.waiting = figure(self.sink, "wattier_spool_batches")
            self.server.start()
            self.feed.for_seconds(2)
            until(lambda: figure(self.sink, "wattier_push_batches_total") > 0)
            self.sink.close()
        except BaseException as problem:
            self.problem = problem


@pytest.fixture(scope="module", autouse=True)
def outages(tmp_path_factory):
    """Start the minute without servers before the first test; the last test of the file looks at the end."""
    folder = tmp_path_factory.mktemp("outage")
    sender.BACKOFF_MOST_SECONDS, most = 8.0, sender.BACKOFF_MOST_SECONDS  # of 30 s, which only cost the suite time
    found = {kind: Outage(kind, folder / kind) for kind in BINARIES if shutil.which(BINARIES[kind])}
    for outage in found.values():
        outage.start()
    yield found
    for outage in found.values():
        outage.join(AWAY_SECONDS + 60)
        outage.server.kill()
        outage.sink.close()
        logging.getLogger("wattier_telemetry").removeHandler(outage.lines)
    sender.BACKOFF_MOST_SECONDS = most


class Scripted(http.server.ThreadingHTTPServer):
    """Answers with the statuses of a list, the last one for ever, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self, *answers, headers=()):
        self.answers, self.extra, self.asked = list(answers), headers, []
        super().__init__(("127.0.0.1", 0), Answering)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class Answering(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, dict(self.headers), body))
        status, text = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        self.send_response(status)
        for header in self.server.extra:
            self.send_header(*header)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture
def scripted():
    servers = []

    def make(*answers, **options):
        servers.append(Scripted(*answers, **options))
        return servers[-1]

    yield make
    for one in servers:
        one.shutdown()
        one.server_close()


class Cut:
    """Stands before a server; kills it in the middle of the second request, or between its work and its answer."""

    def __init__(self, server, *, after_work):
        self.server, self.after_work, self.cut = server, after_work, threading.Event()
        self.requests = 0  # the first batch holds one moment only, which may well arrive twice
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self.carry, args=(client,), daemon=True).start()

    def carry(self, client):
        with client, contextlib.suppress(OSError):
            upstream = socket.create_connection(("127.0.0.1", self.server.port), 5)
            with upstream:
                while head := read_request(client):
                    self.requests += 1
                    if self.requests != 2:
                        upstream.sendall(head)
                    elif self.after_work:
                        upstream.sendall(head)
                        upstream.recv(65536)  # the work is done, the answer is lost
                        self.server.kill()
                        return self.cut.set()
                    else:
                        upstream.sendall(head[: len(head) - 40])
                        time.sleep(0.1)
                        self.server.kill()
                        return self.cut.set()
                    client.sendall(upstream.recv(65536))
        return None


def read_request(client):
    """Return one whole HTTP request, or nothing."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := client.recv(65536)):
            return b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
    )
    while len(body) < length:
        if not (more := client.recv(65536)):
            return b""
        body += more
    return head + b"\r\n\r\n" + body


@both_servers
class TestArrival:
    def test_labels_arrive_byte_exact(self, server, sink):
        one = sink(server.start().url, format=server.format)
        now_ms = time.time_ns() // 1_000_000
        labels = (("trial", HOSTILE), ("empty", ""), ("Zone", "z"), ("a", "b"))
        one.add(now_ms / 1000, [Point("m", labels, 1.5)])
        assert until(lambda: server.series("m"))
        expected = {"__name__": "m", "trial": HOSTILE, "Zone": "z", "a": "b"}
        assert server.series("m") == [
            ({**expected, "instance": socket.gethostname(), "job": "wattier"}, {now_ms: 1.5}),
        ]

    def test_labels_of_the_point_stand(self, server, sink):
        one = sink(server.start().url, format=server.format)
        one.add(time.time(), [Point("m", (("instance", "i"), ("job", "j")), 1.0)])
        assert until(lambda: server.series("m"))
        assert server.series("m")[0][0] == {"__name__": "m", "instance": "i", "job": "j"}

    def test_numbers_arrive_exactly(self, server, sink):
        one = sink(server.start().url, format=server.format)
        values = [0.0, -1.5, 1e-300, 1.7e308, 2.0**53, 123456789.015625, 1 / 3]
        one.add(time.time(), [Point("m", (("number", str(index)),), value) for index, value in enumerate(values)])
        assert until(lambda: len(server.series("m")) == len(values))
        found = sorted(server.series("m"), key=lambda series: series[0]["number"])
        got = [value for _, samples in found for value in samples.values()]
        # VictoriaMetrics stores decimals, which costs the last bits of some binary numbers.
        assert got == (values if server.format == "remote-write" else pytest.approx(values, rel=1e-12))

    def test_infinity_is_no_poison(self, server, sink):
        one = sink(server.start().url, format=server.format)
        one.add(time.time(), [Point("m", (), math.nan), Point("n", (), math.inf), Point("o", (), 1.0)])
        assert until(lambda: server.samples("o"))
        assert until(lambda: figure(one, "wattier_samples_pushed_total") == 3)  # once the answer has come back

    @pytest.mark.parametrize("after_work", [False, True], ids=["half a request", "answer lost"])
    def test_server_killed_in_the_middle_of_a_push(self, server, sink, caplog, after_work):
        cut = Cut(server.start(), after_work=after_work)
        one = sink(cut.url, format=server.format)
        feed = Feed(one).for_seconds(0.6)
        assert cut.cut.wait(90)
        feed.for_seconds(0.5)
        server.start()
        feed.for_seconds(1)
        one.close()
        arrived(server, feed.truth)
        assert lost(one) == 0
        assert "the batches wait in the spool" in caplog.text
        assert "takes samples again" in caplog.text

    def test_server_killed_again_and_again(self, server, sink):
        server.start()
        one = sink(server.url, format=server.format)
        feed = Feed(one, period_seconds=0.01)
        for pause in (0.5, 1.3, 0.9):
            feed.for_seconds(pause)
            server.kill()
            feed.for_seconds(0.2)
            server.start()
        feed.for_seconds(2)
        assert drained(one)
        one.close()
        arrived(server, feed.truth)
        assert lost(one) == 0


PUSHER = """
import sys, time
from pathlib import Path
from wattier_telemetry.exporter.metrics import Point
from wattier_telemetry.push import PushSink
sink = PushSink(sys.argv[1], format=sys.argv[2], spool=Path(sys.argv[3]), flush_seconds=0.5, period_seconds=0.05)
value = 0
while True:
    time_ms = time.time_ns() // 1_000_000
    sink.add(time_ms / 1000, [Point("m", (), value / 8)])
    print(time_ms, value / 8, flush=True)
    value += 1
    time.sleep(0.05)
"""


@both_servers
@pytest.mark.parametrize("away", [False, True], ids=["server there", "server away"])
def test_sigkill_costs_at_most_one_flush_interval_and_is_counted(server, sink, tmp_path, caplog, away):
    if not away:
        server.start()
    command = [sys.executable, "-c", PUSHER, server.url, server.format, str(tmp_path / "spool")]
    pusher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines = [pusher.stdout.readline() for _ in range(42)]  # of 0.05 s each, and more on a busy machine
    time.sleep(0.02)
    pusher.send_signal(signal.SIGKILL)
    rest, _ = pusher.communicate()
    lines += rest.splitlines()
    truth = {int(time_ms): float(value) for time_ms, value in (line.split() for line in lines if line.strip())}
    if away:
        server.start()
    again = sink(server.url, format=server.format)
    assert drained(again)
    again.close()
    assert len(truth) > 20
    counted = figure(again, "wattier_samples_lost_total", reason="killed")
    pushed = figure(again, "wattier_samples_pushed_total")
    assert until(lambda: len(server.samples("m")) >= max(pushed, len(truth) - counted))
    got = settled(lambda: server.samples("m"))
    missing = sorted(truth.keys() - got.keys())
    assert got == {time_ms: value for time_ms, value in truth.items() if time_ms in got}
    assert missing == sorted(truth)[len(got) :]  # the newest, no gap before them
    assert len(missing) <= counted <= 30  # 0.5 s / 0.05 s = 10, and what a slow disk adds
    assert "did not end cleanly (killed)" in caplog.text


class TestAnswers:
    def test_errors_that_pass_are_waited_for(self, scripted, sink, caplog):
        server = scripted((500, b"oops"), (503, b""), (429, b"slow down"), (404, b"no receiver"), (204, b""))
        one = sink(server.url)
        one.add(1000.0, [Point("m", (), 1.0)])
        assert until(lambda: figure(one, "wattier_push_batches_total") == 1)
        assert len({body for _, _, body in server.asked}) == 1
        assert {why: figure(one, "wattier_push_failures_total", reason=why) for why in sender.FAILURES} == {
            **{"server_error": 2, "throttled": 1, "refused": 1},
            **{"unreachable": 0, "timeout": 0, "rejected": 0},
        }
        assert "answers 500 oops" in caplog.text
        assert "takes samples again" in caplog.text

    def test_what_is_never_taken_is_set_aside_and_the_queue_goes_on(self, scripted, sink, tmp_path, caplog):
        server = scripted((400, b"out of order sample"), (204, b""))
        one = sink(server.url)
        one.add(1000.0, [Point("m", (), 1.0), Point("n", (), 1.0)])
        assert until(lambda: figure(one, "wattier_push_failures_total", reason="rejected") == 1)
        one.add(1001.0, [Point("m", (), 2.0)])
        assert until(lambda: figure(one, "wattier_push_batches_total") == 1)
        assert figure(one, "wattier_samples_lost_total", reason="rejected") == 2
        assert len(list((tmp_path / "spool" / "rejected").iterdir())) == 1
        assert "answers 400 out of order sample" in caplog.text

    def test_a_redirect_is_not_followed(self, scripted, sink):
        other = scripted((204, b""))
        server = scripted((307, b""), headers=[("Location", f"{other.url}/api/v1/write")])
        one = sink(server.url)
        one.add(1000.0, [Point("m", (), 1.0)])
        assert until(lambda: figure(one, "wattier_push_failures_total", reason="refused") >= 1)
        assert not other.asked

    def test_a_damaged_segment_is_set_aside_and_the_queue_goes_on(self, scripted, sink, tmp_path, caplog):
        folder = tmp_path / "spool"
        folder.mkdir()
        (folder / "0000000000000001.30.segment").write_bytes(b"torn")
        server = scripted((204, b""))
        one = sink(server.url)
        one.add(1000.0, [Point("m", (), 1.0)])
        assert until(lambda: figure(one, "wattier_push_batches_total") == 1)
        assert figure(one, "wattier_samples_lost_total", reason="corrupt") == 30
        assert figure(one, "wattier_push_failures_total", reason="corrupt") == 1
        assert [path.name for path in (folder / "rejected").iterdir()] == ["0000000000000001.30.segment"]
        assert "is torn or no batch" in caplog.text

    @pytest.mark.parametrize(
        ("url", "token", "expected"),
        [
            ("http://me:p%40ss@HOST", None, "Basic bWU6cEBzcw=="),
            ("http://HOST", "t0ken", "Bearer t0ken"),
            ("http://HOST/some/where?tenant=5", None, None),
        ],
    )
    def test_head_of_a_request(self, scripted, sink, monkeypatch, url, token, expected):
        if token:
            monkeypatch.setenv("WATTIER_PUSH_TOKEN", token)
        server = scripted((204, b""))
        sink(url.replace("HOST", server.url.removeprefix("http://"))).add(1000.0, [Point("m", (), 1.0)])
        assert until(lambda: server.asked)
        path, headers, _ = server.asked[0]
        assert path == ("/some/where?tenant=5" if "where" in url else "/api/v1/write")
        assert headers.get("Authorization") == expected
        assert headers["Content-Encoding"] == "snappy"
        assert headers["Content-Type"] == "application/x-protobuf"
        assert headers["X-Prometheus-Remote-Write-Version"] == "0.1.0"

    def test_secrets_are_in_no_message(self, sink, caplog):
        one = sink(f"http://me:secret@127.0.0.1:{free_port()}/?token=secret")
        one.add(1000.0, [Point("m", (), 1.0)])
        assert until(lambda: figure(one, "wattier_push_failures_total", reason="unreachable") >= 1)
        one.close()
        assert "Connection refused" in caplog.text
        assert "secret" not in caplog.text


class TestClock:
    def test_set_back_by_an_hour(self, tmp_path, sink, caplog):
        """Prometheus keeps what it has; nothing but the samples of the false hour is refused."""
        server = Server("remote-write", tmp_path / "server").start()
        try:
            one = sink(server.url, flush_seconds=0.3)
            now = round(time.time())
            good = [now - 10, now - 9, now, now + 1]
            for second in (*good[:2], now - 3600, now - 3599, *good[2:]):
                one.add(float(second), [Point("m", (), float(second))])
            assert until(lambda: len(server.samples("m")) == 4)
            assert server.samples("m") == {1000 * second: second for second in good}
            assert figure(one, "wattier_samples_lost_total", reason="rejected") == 2
            assert "the clock went back by 3591.000 s" in caplog.text
        finally:
            server.kill()

    def test_two_samples_in_one_millisecond_are_both_kept(self, sink, tmp_path):
        one = sink(f"http://127.0.0.1:{free_port()}")
        for value in range(3):
            one.add(1000.0, [Point("m", (), float(value))])
        one.close()
        spool, kept = Spool(tmp_path / "spool"), []
        while segment := spool.oldest():
            kept += [pair for s in spool.read(segment) for pair in zip(s.times_ms, s.values, strict=True)]
            spool.done(segment)
        spool.close()
        assert kept == [(1_000_000, 0.0), (1_000_001, 1.0), (1_000_002, 2.0)]


def run_queue_seconds():
    """How long this thread was ready to run in its life and the machine did not let it, s."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def test_add_never_waits_for_a_server_that_hangs(sink, caplog):
    with socket.create_server(("127.0.0.1", 0)) as hung:  # accepts, and never says a word
        one = sink(f"http://127.0.0.1:{hung.getsockname()[1]}", flush_seconds=1)
        points = [Point("m", (("uuid", str(n)),), float(n)) for n in range(200)]
        waited = []  # neither at work nor in the run queue
        for _ in range(1200):
            held_up, at_work, start = run_queue_seconds(), time.thread_time(), time.perf_counter()
            one.add(time.time(), points)
            seconds, at_work = time.perf_counter() - start, time.thread_time() - at_work
            waited.append(seconds - at_work - (run_queue_seconds() - held_up))
            time.sleep(0.01)
        assert sorted(waited)[len(waited) // 2] < 200 * 1e-6
        assert max(waited) < 0.5
        assert figure(one, "wattier_push_failures_total", reason="timeout") >= 1
        assert figure(one, "wattier_spool_batches") >= 8
        assert "does not answer within 10 s" in caplog.text
        start = time.monotonic()
        one.close()
        assert time.monotonic() - start < 5
        assert "batches stay in the spool" in caplog.text
        assert lost(one) == 0


FULL_DISK = """
import json, logging, subprocess, sys, time
from pathlib import Path
from wattier_telemetry.exporter.metrics import Point
from wattier_telemetry.push import PushSink
from wattier_telemetry.push.spool import Spool
logging.basicConfig(level=logging.WARNING)
disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], check=True)
sink = PushSink(sys.argv[2], spool=disk / "spool", flush_seconds=0.1, ring_samples=500)
def figures():
    return {p.name + "".join(v for _, v in p.labels): p.value for p in sink.points()}
def fill(first, count):
    for value in range(first, first + count):
        sink.add(1000 + value / 100, [Point("m", (), float(value))])
def wait(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)
def at_risk():
    return json.loads((disk / "spool/state.json").read_text())["at_risk"]
fill(0, 100)
wait(lambda: not sink._held)
try:
    with (disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))
except OSError as error:
    print(error, file=sys.stderr)
fill(100, 300)
wait(lambda: sink._disk_ails and at_risk() >= 300)
before = figures()
fill(400, 1000)
wait(lambda: at_risk() >= 500)
after, risk = figures(), at_risk()
(disk / "ballast").unlink()
wait(lambda: not sink._disk_ails)
sink.close()
spool, kept = Spool(disk / "spool"), []
while segment := spool.oldest():
    kept += [value for series in spool.read(segment) for value in series.values]
    spool.done(segment)
lost = "wattier_samples_lost_totaldisk_full"
print(json.dumps({"kept": kept, "before": before[lost], "after": after[lost], "at_risk": risk}))
"""


def private_mounts():
    """Return a command that may mount, and whose mounts nobody else sees."""
    for options in (["--mount"], ["--user", "--map-root-user", "--mount"]):
        command = ["unshare", *options]
        with contextlib.suppress(OSError):
            if (
                subprocess.run(
                    [*command, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
                ).returncode
                == 0
            ):
                return command
    pytest.skip("this machine lets nobody mount a small disk (neither root nor user namespaces)")


class TestFullDisk:
    def test_memory_holds_the_newest_until_there_is_room(self, tmp_path):
        (tmp_path / "disk").mkdir()
        url = f"http://127.0.0.1:{free_port()}"
        command = [*private_mounts(), sys.executable, "-c", FULL_DISK, str(tmp_path / "disk"), url]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert run.returncode == 0, run.stderr
        assert os.strerror(errno.ENOSPC) in run.stderr  # the disk truly was full
        told = json.loads(run.stdout)
        assert told["before"] == 0  # nothing is lost while memory holds it
        assert told["after"] == 800  # 1,300 came while the disk was full, and memory holds 500
        assert told["kept"] == [float(value) for value in (*range(100), *range(900, 1400))]
        assert told["at_risk"] >= 500  # a SIGKILL now would cost what memory holds
        assert run.stderr.count("the spool cannot be written (No space left on device)") == 1
        assert "the spool can be written again" in run.stderr

    def test_samples_a_closing_process_could_not_write_are_counted_by_the_next(self, tmp_path, monkeypatch, caplog):
        def full(*_):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        options = {"spool": tmp_path / "spool", "flush_seconds": 0.1}
        url = f"http://127.0.0.1:{free_port()}"
        with monkeypatch.context() as patch:
            patch.setattr(Spool, "append", full)
            first = PushSink(url, **options)
            for second in range(7):
                first.add(float(second), [Point("m", (), 1.0)])
            first.close()
        second = PushSink(url, **options)
        assert figure(second, "wattier_samples_lost_total", reason="disk_full") == 7
        second.close()
        assert "the spool cannot be written (Read-only file system)" in caplog.text
        assert "7 samples are lost" in caplog.text


class TestArguments:
    @pytest.mark.parametrize(
        "url",
        ["ftp://host", "host:9090", "http://", "http://host:x", "http://host:99999", "http://h\nost", "file:///x"],
    )
    def test_a_url_that_cannot_be_is_refused_in_one_line(self, url, tmp_path):
        with pytest.raises(ValueError, match="must be http://host:port") as refusal:
            PushSink(url, spool=tmp_path / "spool")
        assert "\n" not in str(refusal.value)
        assert not (tmp_path / "spool").exists()

    def test_a_refused_url_keeps_its_password_to_itself(self):
        with pytest.raises(ValueError, match="host:99999") as refusal:
            Target("http://me:secret@host:99999/?token=secret", format="remote-write")
        assert "secret" not in str(refusal.value)

    def test_format(self):
        with pytest.raises(ValueError, match="push format is 'influx', but must be one of remote-write, victoria"):
            Target("http://host", format="influx")

    def test_a_token_that_breaks_a_header(self):
        with pytest.raises(ValueError, match="WATTIER_PUSH_TOKEN must be one word"):
            Target("http://host", format="remote-write", token="a\r\nb: c")

    @pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
    def test_flush_seconds(self, seconds, tmp_path):
        with pytest.raises(ValueError, match=r"flush_seconds is .*, but must be a positive number of seconds"):
            PushSink("http://host", spool=tmp_path, flush_seconds=seconds)

    def test_a_missing_library_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cramjam", None)
        with pytest.raises(ImportError, match="needs cramjam: pip install cramjam"):
            Target("http://host", format="remote-write")
        Target("http://host", format="victoriametrics")

    def test_one_spool_serves_one_sink(self, sink, tmp_path):
        url = f"http://127.0.0.1:{free_port()}"
        sink(url)
        with pytest.raises(SpoolUnavailable, match="is the spool of another running process"):
            PushSink(url, spool=tmp_path / "spool")


class TestFigures:
    def test_are_those_of_the_table(self, sink):
        points = sink(f"http://127.0.0.1:{free_port()}").points()
        assert {p.name for p in points} == {name for name, *_ in PUSH_METRICS}
        labels = {name: labels for name, _, _, labels in PUSH_METRICS}
        assert all(tuple(key for key, _ in p.labels) == labels[p.name] for p in points)

    def test_a_point_that_is_none_does_not_stop_the_others(self, scripted, sink, caplog):
        one = sink(scripted((204, b"")).url)
        one.add(1000.0, [Point("m", (), None)])
        assert until(lambda: lost(one) == 1)
        one.add(1001.0, [Point("m", (), 1.0)])
        assert until(lambda: figure(one, "wattier_samples_pushed_total") == 1)
        assert "samples that cannot be written are dropped" in caplog.text

    def test_after_close_nothing_is_taken(self, scripted, sink):
        one = sink(scripted((204, b"")).url)
        one.close()
        one.close()
        one.add(1000.0, [Point("m", (), 1.0)])
        assert figure(one, "wattier_samples_pushed_total") == 0


@pytest.mark.parametrize("kind", list(BINARIES))
def test_a_minute_without_a_server_loses_nothing(outages, kind):
    if kind not in outages:
        pytest.skip(f"{BINARIES[kind]} is not installed (Debian package of that name)")
    outage = outages[kind]
    outage.join(AWAY_SECONDS + 60)
    assert not outage.is_alive()
    assert outage.problem is None
    assert outage.waiting >= 20  # batches were written all the time
    assert max(outage.feed.truth) - min(outage.feed.truth) >= 1000 * AWAY_SECONDS
    arrived(outage.server, outage.feed.truth)
    assert lost(outage.sink) == 0
    assert any("Connection refused; the batches wait in the spool" in text for text in outage.lines.texts)
    assert any("takes samples again" in text for text in outage.lines.texts)

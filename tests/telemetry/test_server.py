"""The exporter's door, tried over real sockets: who gets in, and what a hostile or broken client can do (nothing)."""

import contextlib
import errno
import gc
import gzip
import http.client
import logging
import socket
import ssl
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from wattier_telemetry.exporter import access
from wattier_telemetry.exporter import server as module
from wattier_telemetry.exporter.server import MetricsServer, read_token

BODY = b"# HELP x X.\n# TYPE x gauge\nx 1\n"
SECRET = "correct-horse-battery-staple"
GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def start():
    """Return a function that starts servers, which are closed afterwards."""
    running = []

    def starter(render=lambda: BODY, **options):
        running.append(MetricsServer(render, **{"port": 0, **options}))
        return running[-1]

    yield starter
    for server in running:
        server.close()


@pytest.fixture
def quiet(caplog, capfd):
    """Fail the test if anything beyond the server's own one-line messages was said."""
    caplog.set_level(logging.INFO)
    yield
    assert [r.getMessage() for r in caplog.records if r.name not in (access.__name__,)] == []
    assert [r.getMessage() for r in caplog.records if r.exc_info] == []
    assert capfd.readouterr().err == ""


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Make a self-signed certificate for localhost, its key, and the key of somebody else."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("own", "other"):
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        command += ["-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.crt")]
        subprocess.run(command, check=True, capture_output=True)
    return folder


def ask(server, path="/metrics", method="GET", **headers):
    """Return status, headers and body of one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def connect(server, **options):
    return socket.create_connection(("127.0.0.1", server.port), timeout=20, **options)


def read_all(client):
    """Read until the server closes the connection, or resets it."""
    parts = []
    try:
        while part := client.recv(65536):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


def held(server):
    """Count the connections for which the server keeps a file descriptor, from what the kernel says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = psutil.Process().net_connections("tcp")
    return sum(c.laddr.port == server.port and bool(c.raddr) for c in found)


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


class TestPages:
    def test_metrics(self, start, quiet):
        status, headers, body = ask(start())
        assert (status, body) == (200, BODY)
        assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"

    def test_a_query_changes_nothing(self, start):
        assert ask(start(), "/metrics?name[]=x")[2] == BODY

    @pytest.mark.parametrize(("path", "status"), [("/", 200), ("/-/healthy", 200), ("/x", 404), ("/metrics/", 404)])
    def test_other_paths_are_one_line(self, start, path, status):
        got, _, body = ask(start(), path)
        assert got == status
        assert body.count(b"\n") == 1
        assert (b"/metrics" in body) == (path != "/-/healthy")

    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD", "NONSENSE"])
    def test_other_methods_are_refused(self, start, method):
        status, headers, _ = ask(start(), method=method)
        assert (status, headers["allow"]) == (405, "GET")

    def test_one_connection_serves_many_scrapes(self, start):
        server = start()
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.connect()
        own = connection.sock.getsockname()
        for _ in range(5):
            connection.request("GET", "/metrics")
            assert connection.getresponse().read() == BODY
            assert connection.sock.getsockname() == own
        connection.close()

    def test_large_bodies_are_compressed_for_other_machines_that_take_it(self, start):
        large = BODY * 1000
        far = start(lambda: large, _own=(), allow=["127.0.0.0/8"])
        for _ in range(2):
            _, headers, body = ask(far, accept_encoding="deflate, GZIP;q=1.0")
            assert headers["content-encoding"] == "gzip"
            assert len(body) < len(large) / 10
            assert gzip.decompress(body) == large
        for accepted in ("gzip;q=0", "deflate", "identity"):
            assert ask(far, accept_encoding=accepted)[2] == large
        assert ask(start(lambda: large), accept_encoding="gzip")[2] == large
        assert ask(start(_own=(), allow=["127.0.0.0/8"]), accept_encoding="gzip")[2] == BODY

    def test_compressed_bodies_are_never_those_of_an_earlier_scrape(self, start):
        bodies = iter([b"a 1\n" * 1000, b"b 2\n" * 1000])
        server = start(lambda: next(bodies), _own=(), allow=["127.0.0.1"])
        got = [gzip.decompress(ask(server, accept_encoding="gzip")[2])[:3] for _ in range(2)]
        assert got == [b"a 1", b"b 2"]


class TestRender:
    @pytest.fixture
    def asking(self, monkeypatch):
        """Everyone who waits for a page, or has waited."""
        everyone, answer = [], module._Renderer.answer

        async def counted(renderer):
            everyone.append(renderer)
            return await answer(renderer)

        monkeypatch.setattr(module._Renderer, "answer", counted)
        return everyone

    def test_a_failure_is_one_line_and_the_server_lives(self, start, caplog):
        healthy = threading.Event()

        def render():
            if not healthy.is_set():
                raise RuntimeError("secret details")
            return BODY

        server = start(render)
        for _ in range(3):
            status, _, body = ask(server)
            assert (status, body.count(b"\n")) == (500, 1)
            assert b"secret" not in body
        assert [r.getMessage().count("secret details") for r in caplog.records if r.name == access.__name__] == [1]
        healthy.set()
        assert ask(server)[2] == BODY

    def test_scrapers_at_once_share_one_reading(self, start, asking):
        go = threading.Event()
        running, calls, most = [], [], []

        def render():
            running.append(1)
            calls.append(1)
            most.append(len(running))
            go.wait(20)
            running.pop()
            return BODY

        server = start(render)
        clients = [connect(server) for _ in range(20)]
        for client in clients:
            client.sendall(GET.replace(b"Host", b"Connection: close\r\nHost"))
        wait_until(lambda: len(asking) == 20)
        assert ask(server, "/-/healthy")[0] == 200  # a slow reading holds nobody else up
        go.set()
        assert all(read_all(client).endswith(BODY) for client in clients)
        for client in clients:
            client.close()
        assert max(most) == len(calls) == 1

    def test_a_later_scrape_reads_again(self, start):
        numbers = iter(range(100))
        server = start(lambda: b"x %d\n" % next(numbers))
        assert [ask(server)[2] for _ in range(3)] == [b"x 0\n", b"x 1\n", b"x 2\n"]

    def test_a_hung_driver_gives_503_and_does_not_hold_up_the_end(self, start, monkeypatch, asking):
        monkeypatch.setattr(module, "_RENDER_SECONDS", 0.2)
        go = threading.Event()
        calls = []
        server = start(lambda: calls.append(1) or (go.wait(60) and BODY))
        for _ in range(3):
            assert ask(server)[0] == 503
        assert len(calls) == 1
        monkeypatch.setattr(module, "_RENDER_SECONDS", 60)
        with connect(server) as waiting:
            waiting.sendall(GET)
            wait_until(lambda: len(asking) == 4)
            began = time.monotonic()
            server.close()
            assert time.monotonic() - began < 3
            assert b"503" in read_all(waiting)
        go.set()


ADMITTED = [
    ([], "203.0.113.9", True),  # without a list the token, or the loopback address, decides
    (["10.0.0.42"], "10.0.0.42", True),
    (["10.0.0.42"], "10.0.0.4", False),
    (["10.0.0.42"], "110.0.0.42", False),
    (["10.0.0.42"], "::ffff:10.0.0.42", True),
    (["10.0.0.42"], "::10.0.0.42", False),
    (["10.0.0.0/24"], "10.0.0.255", True),
    (["10.0.0.0/24"], "10.0.1.0", False),
    (["::ffff:10.0.0.0/120"], "10.0.0.7", True),
    (["::ffff:10.0.0.0/120"], "10.0.1.7", False),
    (["fd00::/8"], "fd12:3456::1", True),
    (["fd00::/8"], "fe80::1%eth0", False),
    (["fe80::/10"], "fe80::1%eth0", True),
    (["fd00::/8"], "10.0.0.1", False),
    (["0.0.0.0/0"], "203.0.113.9", True),
    (["0.0.0.0/0"], "2001:db8::1", False),
    (["::/0"], "203.0.113.9", False),
    (["0.0.0.0"], "203.0.113.9", False),
    (["192.0.2.0/24", "10.0.0.42"], "10.0.0.42", True),
    (["10.0.0.42"], "127.0.0.1", True),
    (["10.0.0.42"], "127.8.9.10", True),
    (["10.0.0.42"], "::1", True),
    (["10.0.0.42"], "::ffff:127.0.0.1", True),
    (["10.0.0.42"], "128.0.0.1", False),
]


class TestAllowList:
    @pytest.mark.parametrize(("allow", "client", "admitted"), ADMITTED)
    def test_addresses(self, allow, client, admitted):
        assert access.Gate(allow, None, access.LOOPBACK).admits(client) is admitted

    def test_an_outsider_learns_nothing_and_is_hung_up_on(self, start, caplog, quiet):
        server = start(_own=(), allow=["10.0.0.0/8"], token=SECRET)
        for path in ("/metrics", "/", "/-/healthy", "/x"):
            with connect(server) as client:
                client.sendall(GET.replace(b"/metrics", path.encode()))
                head, _, body = read_all(client).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 403")
            assert body == b"Your address is not allowed here.\n"
        assert server.refused == {**dict.fromkeys(access.REASONS, 0), "outside": 4}
        assert ask(server, authorization=f"Bearer {SECRET}")[0] == 403
        assert [r.getMessage() for r in caplog.records] == [
            "refused 127.0.0.1: it is outside the allow-list; 1 refused for this so far"
        ]

    def test_loopback_is_allowed_whatever_the_list(self, start):
        assert ask(start(allow=["10.0.0.0/8"]))[0] == 200

    def test_a_listed_client_gets_in(self, start):
        assert ask(start(_own=(), allow=["127.0.0.0/30"]))[0] == 200

    @pytest.mark.parametrize("text", ["10.0.0.0/33", "10.0.0", "10.0.0.42/24", "example.org", "", "10.0.0.0/24,::1"])
    def test_what_is_no_network_is_named(self, start, text):
        with pytest.raises(ValueError, match=r"10\.0\.0\.0/24") as caught:
            start(allow=["10.0.0.0/8", text])
        assert repr(text) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("address", ["0.0.0.0", "::", ""])
    def test_listening_wide_needs_a_list_or_a_token(self, start, address):
        with pytest.raises(ValueError, match=r"give the networks .* or a token, or listen on 127\.0\.0\.1") as caught:
            start(address=address)
        assert "\n" not in str(caught.value)
        assert ask(start(address=address, allow=["0.0.0.0/0"]))[0] == 200  # "::" listens for IPv4, too
        assert ask(start(address=address, token=SECRET))[0] == 401

    @pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.7", "::1", "localhost"])
    def test_loopback_needs_nothing(self, start, address):
        server = start(address=address)
        with socket.create_connection((address, server.port), timeout=20) as client:
            client.sendall(GET.replace(b"Host", b"Connection: close\r\nHost"))
            assert read_all(client).endswith(BODY)

    def test_strangers_do_not_take_the_places_of_others(self, start):
        server = start(_own=("127.0.0.1",), allow=["10.0.0.0/8"])
        strangers = [connect(server, source_address=("127.0.0.2", 0)) for _ in range(100)]
        wait_until(lambda: server.refused["connections"] == 36)
        assert ask(server)[0] == 200
        for stranger in strangers:
            stranger.close()
        wait_until(lambda: held(server) == 0)
        with connect(server, source_address=("127.0.0.2", 0)) as late:
            late.sendall(GET)
            assert b"403" in read_all(late)


class TestToken:
    def test_the_right_one_opens(self, start):
        assert ask(start(token=SECRET), authorization=f"Bearer {SECRET}")[2] == BODY
        assert ask(start(token=SECRET), authorization=f"bearer  {SECRET} ")[2] == BODY

    @pytest.mark.parametrize(
        "given",
        [None, "", "Bearer", "Bearer ", f"Bearer {SECRET}x", f"Bearer {SECRET[:-1]}", f"Basic {SECRET}", SECRET],
    )
    @pytest.mark.parametrize("path", ["/metrics", "/-/healthy", "/x"])
    def test_others_do_not(self, start, given, path):
        server = start(token=SECRET)
        status, headers, body = ask(server, path, **({} if given is None else {"authorization": given}))
        assert (status, headers["www-authenticate"]) == (401, 'Bearer realm="wattier"')
        assert SECRET.encode() not in body
        assert server.refused["token"] == 1

    def test_two_at_once_are_none(self, start):
        with connect(start(token=SECRET)) as client:
            line = f"Authorization: Bearer {SECRET}\r\n".encode()
            client.sendall(GET.replace(b"Host", line + line + b"Host"))
            assert read_all(client).startswith(b"HTTP/1.1 401")

    def test_refusals_are_logged_once_a_minute_and_without_the_token(self, start, caplog):
        server = start(token=SECRET)
        for _ in range(5):
            ask(server, authorization="Bearer guessed-by-somebody")
        assert server.refused["token"] == 5
        assert len(caplog.records) == 1
        assert "guessed" not in caplog.text

    def test_an_empty_one_is_a_mistake(self, start):
        with pytest.raises(ValueError, match="token: is empty"):
            start(token=" ")

    def test_read_from_a_file(self, tmp_path):
        path = tmp_path / "token"
        path.write_text(f" {SECRET}\n")
        path.chmod(0o600)
        assert read_token(path) == SECRET

    @pytest.mark.parametrize(
        ("text", "mode", "message"),
        [
            (SECRET, 0o640, r"others may read it \(mode 0640\); chmod 600"),
            (SECRET, 0o604, "others may read it"),
            ("\n", 0o600, "is empty"),
            ("fifteen-letters", 0o600, "holds 15 characters, but must hold 16"),
            ("two words of a good length", 0o600, "one word of printable ASCII"),
            ("schlüssel-schlüssel", 0o600, "one word of printable ASCII"),
        ],
    )
    def test_a_bad_file_is_one_line(self, tmp_path, text, mode, message):
        path = tmp_path / "token"
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)
        with pytest.raises(ValueError, match=message) as caught:
            read_token(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert text.strip() == "" or text.strip() not in str(caught.value)

    def test_a_missing_file_is_one_line(self, tmp_path):
        for path in (tmp_path / "none", tmp_path):
            with pytest.raises(ValueError, match="cannot be read"):
                read_token(path)


class TestTls:
    def secure(self, start, pair, **options):
        return start(certificate=pair / "own.crt", key=pair / "own.key", **options)

    def test_a_client_that_knows_the_certificate(self, start, pair, quiet):
        server = self.secure(start, pair, token=SECRET)
        context = ssl.create_default_context(cafile=pair / "own.crt")
        connection = http.client.HTTPSConnection("localhost", server.port, context=context, timeout=20)
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {SECRET}"})
        assert connection.getresponse().read() == BODY
        assert connection.sock.version() in {"TLSv1.2", "TLSv1.3"}
        connection.close()

    def test_http2_is_not_offered(self, start, pair):
        context = ssl.create_default_context(cafile=pair / "own.crt")
        context.set_alpn_protocols(["h2", "http/1.1"])
        with context.wrap_socket(connect(self.secure(start, pair)), server_hostname="localhost") as client:
            assert client.selected_alpn_protocol() == "http/1.1"

    def test_old_tls_is_refused(self, start, pair):
        context = ssl.create_default_context(cafile=pair / "own.crt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")  # the client would; it is the server that must not
        server = self.secure(start, pair)
        client = connect(server)
        with client, pytest.raises(ssl.SSLError, match=r"(?i)alert|version|EOF"):
            context.wrap_socket(client, server_hostname="localhost")

    def test_plain_text_and_noise_leave_no_trace(self, start, pair, quiet):
        server = self.secure(start, pair)
        for noise in (GET, b"\x16\x03\x01\xff\xff", b"\x00" * 1000, b""):
            with connect(server) as client:
                client.sendall(noise)
                client.shutdown(socket.SHUT_WR)
                assert BODY not in read_all(client)
        self.test_a_client_that_knows_the_certificate(start, pair, None)

    def test_the_end_is_quick_with_a_handshake_under_way(self, start, pair, quiet):
        server = self.secure(start, pair)
        with connect(server) as client:
            client.sendall(b"\x16\x03\x01")
            wait_until(lambda: held(server) == 1)
            began = time.monotonic()
            server.close()
            assert time.monotonic() - began < 3
            gc.collect()  # would find what was left open, and warn
            assert read_all(client) == b""

    def test_a_silent_client_is_hung_up_on(self, start, pair, monkeypatch, quiet):
        monkeypatch.setattr(module, "_QUIET_SECONDS", 0.5)
        with connect(self.secure(start, pair)) as client:
            assert read_all(client) == b""

    @pytest.mark.parametrize(
        ("certificate", "key", "message"),
        [
            ("own.crt", None, "TLS: the key is missing"),
            (None, "own.key", "TLS: the certificate is missing"),
            ("none.crt", "own.key", r"certificate .*none\.crt: cannot be read"),
            ("own.crt", "none.key", r"key .*none\.key: cannot be read"),
            ("own.crt", "other.key", r"must be a PEM pair that belongs together.*MISMATCH"),
            ("own.key", "own.key", "must be a PEM pair"),
            ("own.crt", "locked.key", "without a passphrase"),
        ],
    )
    def test_wrong_files_are_one_line(self, start, pair, certificate, key, message):
        locked = pair / "locked.key"
        command = ["openssl", "rsa", "-aes128", "-passout", "pass:secret", "-in", str(pair / "own.key")]
        subprocess.run([*command, "-out", str(locked)], check=True, capture_output=True)
        with pytest.raises(ValueError, match=message) as caught:
            start(certificate=certificate and pair / certificate, key=key and pair / key)
        assert "\n" not in str(caught.value)


class TestHostileClients:
    @pytest.fixture(autouse=True)
    def nothing_is_said(self, quiet):
        """No tracebacks, whatever clients do."""

    def test_a_header_of_10_megabytes(self, start):
        server = start()
        answer = b""
        with connect(server) as client:
            with contextlib.suppress(ConnectionError):
                client.sendall(b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 10_000_000 + b"\r\n\r\n")
            answer = read_all(client)
        assert answer == b"" or answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
        assert ask(server)[2] == BODY

    def test_a_thousand_slow_connections(self, start, monkeypatch):
        monkeypatch.setattr(module, "_QUIET_SECONDS", 4.0)
        server = start()
        clients = [connect(server) for _ in range(1000)]
        wait_until(lambda: held(server) > 900)
        trickling = clients[::2]
        began = time.monotonic()
        for number in range(5):
            assert ask(server)[2] == BODY
            for client in trickling:
                with contextlib.suppress(ConnectionError):
                    client.sendall(GET[number : number + 1])
        assert time.monotonic() - began < 4
        end = time.monotonic() + 30
        for number in range(5, 30):  # the trickle goes on: each byte must not buy more time
            if held(server) == 0:
                break
            assert time.monotonic() < end
            time.sleep(0.5)
            for client in trickling:
                with contextlib.suppress(ConnectionError):
                    client.sendall(GET[number : number + 1])
        assert held(server) == 0
        assert server.refused["slow"] == 1000
        assert not any(BODY in read_all(client) for client in clients)
        for client in clients:
            client.close()
        assert ask(server)[2] == BODY

    def test_one_that_never_reads(self, start, monkeypatch):
        monkeypatch.setattr(module, "_QUIET_SECONDS", 1.5)
        calls = []
        server = start(lambda: calls.append(1) or BODY * 10_000)
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(2)
        client.connect(("127.0.0.1", server.port))
        with client:
            with contextlib.suppress(TimeoutError, ConnectionError):
                for _ in range(2000):
                    client.sendall(GET)
            assert ask(server)[0] == 200
            wait_until(lambda: held(server) == 0, 60)
        assert len(calls) < 200  # of 2000: what nobody reads is not made

    @pytest.mark.parametrize(
        "noise",
        [
            b"\x00" * 5000,
            b"\r\n" * 5000,
            bytes(range(256)) * 10,
            b"GET\r\n\r\n",
            b"GET /metrics HTTP/9.9\r\n\r\n",
            b"GET /metrics HTTP/1.1\r\n\r\n",
            b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /%ff%00%0a HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
            b"GET /metrics HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00" * 50,
            b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        ],
    )
    def test_noise(self, start, noise):
        server = start()
        with connect(server) as client:
            client.sendall(noise)
            client.shutdown(socket.SHUT_WR)
            assert BODY not in read_all(client)
        assert ask(server)[2] == BODY
        wait_until(lambda: held(server) == 0)

    def test_garbage_behind_a_good_request(self, start):
        server = start()
        with connect(server) as client:
            client.sendall(GET + GET + b"\x00garbage\r\n\r\n")
            answer = read_all(client)
        assert answer.count(BODY) == 2
        assert b"HTTP/1.1 400" in answer
        assert server.refused["malformed"] == 1

    @pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
    def test_an_upgrade_is_not_granted(self, start, protocol):
        with connect(start()) as client:
            lines = b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZQ==\r\n"
            client.sendall(GET.replace(b"Host", b"Upgrade: " + protocol + b"\r\n" + lines + b"Host"))
            client.shutdown(socket.SHUT_WR)
            answer = read_all(client)
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(BODY)

    def test_one_that_leaves_early(self, start):
        began = threading.Event()

        def render():
            began.set()
            time.sleep(0.1)
            return BODY * 1000

        server = start(render)
        for linger in (b"\x00" * 8, b"\x01\0\0\0\0\0\0\0"):  # a polite end, and a reset
            for _ in range(5):
                began.clear()
                client = connect(server)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                client.sendall(GET + GET)
                assert began.wait(20)
                client.close()
        assert ask(server)[0] == 200
        wait_until(lambda: held(server) == 0)

    def test_a_short_body_is_ignored(self, start):
        with connect(start()) as client:
            client.sendall(GET.replace(b"Host", b"Content-Length: 5\r\nHost") + b"hello")
            assert read_all(client).endswith(BODY)

    def test_an_endless_body_is_not_read(self, start):
        server = start(lambda: time.sleep(0.2) or BODY)
        with connect(server) as client:
            client.sendall(GET.replace(b"Host", b"Transfer-Encoding: chunked\r\nHost"))
            with pytest.raises(ConnectionError):
                while True:
                    client.sendall(b"1\r\nx\r\n" * 10_000)
        assert ask(server)[2] == BODY
        wait_until(lambda: held(server) == 0)


class TestLife:
    def test_a_taken_port_is_an_error_at_once(self, start):
        with pytest.raises(OSError, match="in use"):
            start(port=start().port)

    def test_two_servers_live_side_by_side(self, start):
        one, two = start(lambda: b"one 1\n"), start(lambda: b"two 2\n")
        assert (ask(one)[2], ask(two)[2]) == (b"one 1\n", b"two 2\n")
        one.close()
        assert ask(two)[2] == b"two 2\n"

    def test_it_starts_in_any_thread(self, start):
        with ThreadPoolExecutor(1) as pool:
            server = pool.submit(start).result()
        assert ask(server)[2] == BODY

    def test_the_end_is_quick_and_leaves_nothing(self, start, quiet):
        before = set(threading.enumerate())
        server = start(lambda: BODY * 10_000)
        idle, half, greedy = (connect(server) for _ in range(3))
        half.sendall(b"GET /met")
        greedy.settimeout(1)
        with contextlib.suppress(TimeoutError):
            for _ in range(2000):
                greedy.sendall(GET)
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < 3  # 2 s, and some for a busy machine
        server.close()
        assert set(threading.enumerate()) == before
        for client in (idle, half, greedy):
            client.close()
        start(port=server.port)

    def test_clients_that_come_at_the_end_are_not_lost(self, start):
        for _ in range(3):
            server = start()
            ask(server)
            server._loop.call_soon_threadsafe(time.sleep, 0.3)  # they and the end are seen together
            time.sleep(0.1)
            clients = [connect(server) for _ in range(5)]
            server.close()
            gc.collect()  # would find what was left open, and warn
            for client in clients:
                assert read_all(client) == b""
                client.close()

    def test_what_the_event_loop_complains_of_is_one_line_at_most(self, start, caplog, capfd):
        server = start()
        for error in (OSError(errno.EMFILE, "Too many open files"), ZeroDivisionError()) * 3:
            context = {"message": "x", "exception": error}
            server._loop.call_soon_threadsafe(server._loop.call_exception_handler, context)
        assert ask(server)[2] == BODY
        assert [r.getMessage() for r in caplog.records if r.levelno > logging.DEBUG] == [
            "no connection can be taken: [Errno 24] Too many open files"
        ]
        assert capfd.readouterr().err == ""

    def test_file_descriptors_are_asked_for(self):
        code = """if True:
            import resource
            from wattier_telemetry.exporter.server import MetricsServer
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (200, min(hard, 3000) if hard > 0 else 3000))
            server = MetricsServer(lambda: b"", port=0)
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(hard, 3000) or 0 > hard, "not raised"
            server.close()
        """
        subprocess.run([sys.executable, "-W", "error", "-X", "dev", "-c", code], check=True, timeout=60)

    def test_a_process_that_is_told_to_end_does(self):
        code = """if True:
            import threading, urllib.request
            from wattier_telemetry.exporter.server import MetricsServer
            server = MetricsServer(lambda: threading.Event().wait(), port=0)
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=0.2)
            except TimeoutError:
                pass
        """
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

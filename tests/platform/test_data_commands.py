"""`wattier data fetch` and `wattier data stats`, as a user calls them."""

import hashlib
import html
import http.server
import json
import re
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from wattier import cli
from wattier.data_plots import elements_figure, force_figure, place_of, write_stats_page
from wattier.data_stats import find_store, stats_info
from wattier.errors import UserError
from wattier_gnn.datasets import READERS, SYMBOLS, releases
from wattier_gnn.datasets.releases import Release, ReleaseFile
from wattier_gnn.ingest import ingest
from wattier_gnn.sample import sample_path
from wattier_gnn.structure import DataError

SOURCES = ("ani1x", "oc20")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "a <b>store</b>"
    ingest(
        {source: sample_path(source) for source in SOURCES}, folder, cutoff_angstrom=4.0,
        max_force_ev_per_angstrom=100.0, on_bad="skip", split={"train": 0.8, "val": 0.1, "test": 0.1}, seed=0,
        say=lambda _text: None,
    )  # fmt: skip
    return folder


@pytest.fixture
def quickstart(tmp_path):
    """A config whose run directory is here, and not there yet."""
    text = (Path(__file__).parents[2] / "configs" / "quickstart.yaml").read_text(encoding="utf-8")
    config = tmp_path / "quickstart.yaml"
    config.write_text(re.sub(r"(?m)^run_dir:.*", f"run_dir: {tmp_path / 'run'}", text), encoding="utf-8")
    return config


@pytest.fixture
def refused(monkeypatch, capsys):
    """The one line on stderr with which the command is refused, exit code 2."""

    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["wattier", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        lines = capsys.readouterr().err.splitlines()
        assert (caught.value.code, len(lines)) == (2, 1), lines
        return lines[0]

    return command


def test_help_lists_and_explains_the_commands():
    listed = CliRunner().invoke(cli.app, ["data", "--help"], env={"COLUMNS": "200"}).output
    for verb, word in (("fetch", "published checksum"), ("stats", "STORE|CONFIG|RUN")):
        assert verb in listed
        explained = CliRunner().invoke(cli.app, ["data", verb, "--help"], env={"COLUMNS": "200"}).output
        assert len(explained.splitlines()) > 10
        assert word in explained


class TestStats:
    def test_json_agrees_with_the_files(self, store):
        done = CliRunner().invoke(cli.app, ["data", "stats", str(store), "--json"], catch_exceptions=False)
        figures = json.loads(done.stdout)
        assert figures["cutoff_angstrom"] == 4.0
        assert list(figures["sources"]) == list(SOURCES)
        for source, found in figures["sources"].items():
            structures = []
            for shard in READERS[source].shards(sample_path(source)):
                try:
                    for structure in READERS[source].read(shard):
                        structures.append(structure)
                except DataError:
                    assert found["unreadable_files"]
            forces = [np.linalg.norm(s.forces_ev_per_angstrom, axis=1) for s in structures]
            kept = [
                s for s, f in zip(structures, forces, strict=True)
                if np.isfinite(s.energy_ev) and np.isfinite(f).all() and f.max() < 100
            ]  # fmt: skip
            assert found["read"] == len(structures)
            assert found["structures"] == len(kept)
            assert sum(found["removed"].values()) == len(structures) - len(kept)
            sizes = [len(s.numbers) for s in kept]
            assert found["atoms"] == sum(sizes)
            spread = found["atoms_per_structure"]
            assert [spread["minimum"], spread["maximum"]] == [min(sizes), max(sizes)]
            assert spread["mean"] == pytest.approx(np.mean(sizes))
            assert spread["deviation"] == pytest.approx(np.std(sizes))
            norms = np.concatenate([np.linalg.norm(s.forces_ev_per_angstrom, axis=1) for s in kept])
            assert found["force_norm_ev_per_angstrom"]["mean"] == pytest.approx(norms.mean())
            assert found["force_norm_quantiles_ev_per_angstrom"]["0.5"] == pytest.approx(np.median(norms), rel=0.02)
            elements = Counter(int(z) for s in kept for z in np.unique(s.numbers))
            assert found["elements"] == {str(z): elements[z] for z in sorted(elements)}
            energy = found["aligned_energy_ev_per_atom"]
            assert energy["minimum"] < 0 < energy["maximum"]
            assert energy["deviation"] < np.std([s.energy_ev / len(s.numbers) for s in kept])

    def test_tables(self, store):
        done = CliRunner().invoke(cli.app, ["data", "stats", str(store)], catch_exceptions=False)
        info = stats_info(store)
        assert done.exit_code == 0
        for source in info.sources:
            row = next(line for line in done.stdout.splitlines() if line.startswith(f"│ {source.source}"))
            assert f"{source.structures:,}" in row
            assert f"{source.atoms:,}" in row
        total = sum(source.structures for source in info.sources)
        assert re.search(rf"│ total +│ +{total:,} │", done.stdout)
        assert "4 elements: H, C, N, O" in done.stdout
        assert "oc20: not read to its end:" in done.stdout

    def test_the_page_needs_no_network_and_obeys_no_name(self, store, tmp_path):
        page = tmp_path / "stats.html"
        done = CliRunner().invoke(cli.app, ["data", "stats", str(store), "--html", str(page)], catch_exceptions=False)
        assert f"Figures: {page}" in done.stdout
        text = page.read_text(encoding="utf-8")
        assert html.escape(str(store)) in text
        assert "<b>store</b>" not in text
        assert not re.search(r"<(script|link|img)[^>]*(src|href)=", text)
        assert [name for name in ("atoms", "energies", "forces", "elements") if f'<div id="{name}">' not in text] == []
        assert not list(tmp_path.glob("*.tmp"))

    def test_the_heat_map_shows_the_share_of_structures(self, store):
        info = stats_info(store)
        (heat,) = elements_figure(info).data
        total = sum(source.structures for source in info.sources)
        for number in (1, 6, 29):
            holding = sum(source.elements.get(number, 0) for source in info.sources)
            row, column = place_of(number)
            assert heat.text[row][column] == SYMBOLS[number]
            assert 10 ** heat.z[row][column] == pytest.approx(holding / total)
        assert np.isnan(heat.z[place_of(2)])

    def test_no_two_elements_share_a_place(self):
        places = [place_of(number) for number in range(1, 119)]
        assert len(set(places)) == 118
        known = {"H": (0, 0), "He": (0, 17), "B": (1, 12), "Fe": (3, 7), "La": (8, 2), "Hf": (5, 3), "U": (9, 5)}
        assert {symbol: places[SYMBOLS.index(symbol) - 1] for symbol in known} == known

    def test_a_page_of_an_odd_store(self, store, tmp_path):
        info = stats_info(store)
        from wattier_gnn.stats import Stats

        write_stats_page(info._replace(sources=Stats(["<i>", "b"]).of_sources()), tmp_path / "a.html")
        assert "<i>" not in (tmp_path / "a.html").read_text(encoding="utf-8").split("<body>")[1]

    @pytest.mark.parametrize("maxima", [(np.nan, 3.48), (3.48, np.nan), (np.nan, np.nan)])
    def test_forces_that_are_unknown_claim_nothing(self, store, maxima):
        info = stats_info(store)
        sources = [
            source._replace(force_ev_per_angstrom=source.force_ev_per_angstrom._replace(maximum=maximum))
            for source, maximum in zip(info.sources, maxima, strict=True)
        ]
        title = force_figure(info._replace(sources=sources)).layout.title.text
        assert title == ("The strongest force on an atom is 3.48 eV/Å" if 3.48 in maxima else "No forces are known")

    def test_the_store_of_a_run(self, store, tmp_path, quickstart):
        run = tmp_path / "run"
        (run / "data").mkdir(parents=True)
        (run / "data" / "store").symlink_to(store)
        assert find_store(quickstart) == run / "data" / "store"
        (run / "config.yaml").write_text(quickstart.read_text(encoding="utf-8"), encoding="utf-8")
        assert find_store(run) == run / "data" / "store"
        assert find_store(store) == store

    def test_nothing_to_look_at(self, refused, tmp_path, quickstart):
        assert "has no store yet" in refused("data", "stats", quickstart)
        assert "not a readable store" in refused("data", "stats", tmp_path)
        assert str(tmp_path / "nowhere") in refused("data", "stats", tmp_path / "nowhere")
        with pytest.raises(UserError):
            find_store(tmp_path / "nowhere")


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_arguments):
        """Nothing on the screen."""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A release of one file, and the folder that a server on this machine serves."""
    served = tmp_path / "served"
    served.mkdir()
    content = b"x" * 3_000_000
    (served / "a.h5").write_bytes(content)
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *arguments: Handler(*arguments, directory=str(served))
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}/a.h5"
    file = ReleaseFile("a.h5", url, md5=hashlib.md5(content).hexdigest())
    monkeypatch.setattr("wattier_gnn.fetch.RELEASES", {**releases.RELEASES, "ani1x": Release("ani1x", "here", (file,))})
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield server, served
    server.shutdown()
    server.server_close()
    thread.join()


class TestFetch:
    def fetch(self, *arguments):
        return CliRunner().invoke(cli.app, ["data", "fetch", "ani1x", *map(str, arguments)], catch_exceptions=False)

    def test_it_says_what_came_and_under_which_licence(self, site, tmp_path):
        done = self.fetch("--to", tmp_path / "to")
        assert done.exit_code == 0
        assert "licence: CC0-1.0" in done.stdout
        assert "Smith et al." in done.stdout
        assert f"{tmp_path / 'to' / 'a.h5'}: fetched, md5 as published" in done.stdout
        assert f"data.sources.ani1x: {tmp_path / 'to'}" in done.stdout
        assert "a.h5: 3.0 MB of 3.0 MB" in done.stdout
        assert "was there, md5 as published" in self.fetch("--to", tmp_path / "to").stdout

    def test_another_address(self, site, tmp_path):
        server, _ = site
        done = self.fetch("--to", tmp_path / "to", "--url", f"http://127.0.0.1:{server.server_address[1]}/")
        assert (tmp_path / "to" / "a.h5").stat().st_size == 3_000_000
        assert done.exit_code == 0

    def test_an_interruption_says_how_to_go_on(self, site, tmp_path, monkeypatch):
        def interrupted(*_arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr("wattier_gnn.fetch.fetch", interrupted)
        done = self.fetch("--to", tmp_path / "to")
        assert done.exit_code == 130
        assert "The same command goes on from here" in done.stderr

    def test_refusals_are_one_line(self, site, refused, tmp_path, capsys):
        _, served = site
        assert "must be one of ani1x" in refused("data", "fetch", "ani")
        assert "has no file 'b*'" in refused("data", "fetch", "ani1x", "--files", "b*")
        (served / "a.h5").write_bytes(b"y" * 3_000_000)
        assert "but must be the published a.h5" in refused("data", "fetch", "ani1x", "--to", tmp_path / "to")
        (served / "a.h5").unlink()
        assert "the server says 404" in refused("data", "fetch", "ani1x", "--to", tmp_path / "to")

"""What `wattier export` writes: a folder that stands alone, its card, and an example that needs wattier_gnn alone."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fabricated
import numpy as np
import pytest
import torch
import yaml
from ase.build import molecule
from ase.data import atomic_numbers

from wattier import cli
from wattier.citation import PAPER
from wattier.config import RunConfig
from wattier.errors import UserError
from wattier.evaluate import evaluate_run
from wattier.ledger import ledger_info, phase_of
from wattier.model_card import EXAMPLES, INDEXED, CardFacts, example_of, release_texts
from wattier.records import Fidelity, PhaseEnergy, TrialResult
from wattier.release import data_facts, export_release
from wattier.rundir import FULL_STAGE, RunDir, append_json_line
from wattier_gnn.calculator import WattierCalculator
from wattier_gnn.checkpoint import save_atomically
from wattier_gnn.datasets import READERS
from wattier_gnn.model import ModelConfig, build_model
from wattier_gnn.release import load_release, verify_release
from wattier_gnn.splits import TEST, TRAIN, VAL
from wattier_gnn.store import Store, write_store
from wattier_gnn.structure import Structure
from wattier_telemetry import EnergyReport, Share
from wattier_telemetry.journal import Journal

REPOSITORY = Path(__file__).parents[2]
SOURCES = ("ani1x", "qm7x")
START = 1_760_000_000.0
# What the example may not need: a user who was handed a release has installed wattier[gnn], and no more.
FORBIDDEN = ("wattier", "wattier_telemetry", "ray", "optuna", "pydantic", "typer", "rich", "jinja2", "yaml", "plotly",
             "sklearn", "huggingface_hub")  # fmt: skip


def structures(source, n):
    """Displaced molecules with energies that no network knows."""
    rng = np.random.default_rng(7)
    for k in range(n):
        atoms = molecule(("CH3OH", "H2O", "CH4")[k % 3])
        atoms.rattle(0.05, seed=k)
        yield Structure(
            atoms.numbers.astype(np.int64), atoms.positions, None, (False, False, False),
            float(-100.0 * len(atoms) + rng.normal()), rng.normal(size=(len(atoms), 3)), source, f"g{k}", f"k{k}",
        )  # fmt: skip


def joules_of(number, joules):
    return EnergyReport.of(
        [Share("gpu-0", "gpu", START + 100 * number, START + 100 * number + 60, 1.0, joules, "counter", 1.0)]
    )


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """An evaluated run of untrained members."""

    def make(n_members):
        folder = tmp_path_factory.mktemp("run") / "run"
        config = RunConfig.model_validate({
            "name": "fabricated", "run_dir": str(folder), "telemetry": {"source": "none"},
            "data": {"sources": dict.fromkeys(SOURCES, "sample"), "cutoff_angstrom": 3.0},
            "search": {"space": {"hidden_dim": {"choices": [8]}}, "stages": [{"name": "s", "trials": 1, "epochs": 1}]},
        })  # fmt: skip
        run = RunDir.create(config)
        every = [s for source in SOURCES for s in structures(source, 30)]
        split = np.array([(TRAIN, VAL, TEST)[k % 3] for k in range(len(every))], dtype=np.int8)
        write_store(run.store_path, every, split, sources=SOURCES, cutoff_angstrom=3.0)
        for k in range(n_members):
            name = f"full-{k:03d}"
            model = build_model(ModelConfig(SOURCES, (1.0, 2.0), 4.0, 3.0, 8, 1, 4, 8, 1, forces="vector"), seed=k)
            path = run.trial_folder(FULL_STAGE, name) / "best.pt"
            path.parent.mkdir(parents=True)
            save_atomically({"config": model.config.to_dict(), "model": model.state_dict()}, path)
            bill = joules_of(k, 1000.0 * (k + 1))
            Journal(path.parent / "rank0.energy.json").finish(bill)
            result = TrialResult(
                run="fabricated", trial_id=name, params={"hidden_dim": 8}, fidelity=Fidelity(FULL_STAGE, None, 1, 1),
                status="complete", val_loss=0.5, val_by_source={}, epochs_done=1, structures_seen=20, wall_seconds=60.0,
                energy=bill, n_parameters=1, checkpoint=str(path.relative_to(run.path)),
            )  # fmt: skip
            append_json_line(run.trials_path, result.to_dict())
        evaluate_run(run, config, run.trials(FULL_STAGE), torch.device("cpu"), lambda _: None)
        return run, config

    return make


@pytest.fixture(scope="module")
def exported(make_run):
    """Shared: do not write to it."""
    run, config = make_run(3)
    return run, config, export_release(run, config)


def card_of(folder):
    from huggingface_hub import ModelCard

    return ModelCard((folder / "README.md").read_text(encoding="utf-8"))


def test_the_release_is_the_ensemble_that_was_evaluated(exported):
    run, _, folder = exported
    store, ensemble = Store(run.store_path), load_release(folder)
    evaluation = run.evaluation()
    for index, source in enumerate(SOURCES):
        chosen = store.indices(TEST)[store.source_index[store.indices(TEST)] == index]
        said = [ensemble.predict([_structure(store, int(k), source)], source).energy_ev[0] for k in chosen]
        error = np.abs(np.array(said) - store.energy[chosen]).mean()
        assert error == pytest.approx(evaluation["sources"][source]["energy_mae_ev"], rel=1e-3)


def _structure(store, k, source):
    arrays = store.gather(np.array([k]), edges=False)
    n = int(store.n_atoms[k])
    return Structure(
        arrays["numbers"].astype(np.int64), arrays["positions"].astype(np.float64), None, (False,) * 3, 0.0,
        np.zeros((n, 3)), source, "g", "k",
    )  # fmt: skip


def test_the_manifest_says_where_it_is_from(exported):
    run, _, folder = exported
    manifest = verify_release(folder).data
    assert manifest["metrics"] == run.evaluation()["sources"]
    assert manifest["data"]["qm7x"]["structures"] == {"train": 10, "val": 10, "test": 10}
    assert manifest["data"]["qm7x"]["elements"] == [1, 6, 8]
    assert manifest["about_members"]["full-001"]["energy_joules"] == 2000.0
    assert manifest["energy_total"]["joules"] == sum(phase["joules"] for phase in manifest["energy_by_phase"]) == 6000.0
    assert manifest["parent"] is None


def test_the_documentation_names_every_key(exported):
    text = (REPOSITORY / "docs" / "release.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(verify_release(exported[2]).data)
    listed = {line.split()[0] for line in text.split("```")[1].splitlines() if line}
    found = {re.sub("full-[0-9]+", "<member>", p.relative_to(exported[2]).as_posix())
             for p in exported[2].rglob("*") if p.is_file()}  # fmt: skip
    assert found == listed


def test_one_member_and_fifteen(make_run):
    for n in (1, 15):
        run, config = make_run(n)
        folder = export_release(run, config)
        assert len(load_release(folder).members) == n
        assert card_of(folder).data.eval_results
        assert ("no uncertainty" in (folder / "README.md").read_text()) == (n == 1)
        assert sum(line.startswith("| full-") for line in (folder / "README.md").read_text().splitlines()) == n


class TestCard:
    def test_the_hub_s_own_library_reads_it(self, exported):
        run, _, folder = exported
        data, metrics = card_of(folder).data, run.evaluation()["sources"]
        assert data.library_name == "wattier"
        assert data.license == "bsd-3-clause"
        assert data.model_name == "fabricated"
        found = {(r.dataset_type, r.metric_name): (r.metric_type, r.metric_value) for r in data.eval_results}
        assert len(found) == len(data.eval_results) == 10
        for source in SOURCES:
            assert found[source, "energy MAE (eV)"] == ("mae", metrics[source]["energy_mae_ev"])
            assert found[source, "force RMSE (eV/Å)"] == ("rmse", metrics[source]["force_rmse_ev_per_angstrom"])
        again = yaml.safe_load(data.to_yaml())
        assert again["model-index"][0]["name"] == "fabricated"

    def test_the_bill_is_the_ledger_s(self, exported):
        run, _, folder = exported
        ledger = ledger_info(run)
        rows = table(folder, "## What it cost")
        assert [row["phase"] for row in rows] == [*(phase.phase for phase in ledger.phases), "total"]
        assert rows[-1]["energy"] == "6.00 kJ"
        assert float(rows[-1]["kWh"]) == pytest.approx(6000 / 3.6e6, rel=1e-2)
        assert rows[-1]["how it is known"] == "counter"
        text = (folder / "README.md").read_text()
        assert not re.search("CO2|CO₂|carbon|emission", text, re.IGNORECASE), "nobody has measured that"

    def test_tables_are_tables(self, exported):
        """Each row has as many cells as its head: a name that breaks one would hide a figure."""
        text = (exported[2] / "README.md").read_text()
        assert "\n\n\n" not in text
        for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block

    def test_what_nobody_knows_is_said_to_be_unknown(self):
        facts = CardFacts("bare", "0.1.0", fabricated.ensemble(), ["a", "b"])
        texts = release_texts(facts)
        assert set(texts) == {"README.md", "example.py", "CITATION.cff"}
        for said in (
            "Not evaluated.",
            "Unknown.",
            "Not stated by those who made the release",
            "was not held against errors",
        ):
            assert said in texts["README.md"]
        head = yaml.safe_load(texts["README.md"].split("---")[1])
        assert "license" not in head
        assert "model-index" not in head
        assert "| oxides | unknown | unknown | unknown | H O | unknown | unknown |" in texts["README.md"]
        assert "None" not in texts["README.md"]

    def test_an_estimate_is_not_given_a_precision(self):
        measured = PhaseEnergy("full training", 3.6e6, "counter", 1.0, 4, (), 3.5e6, 3.8e6)
        share = Share("c", "cpu", 0.0, 1.0, 1.0, 10.0, "estimated", 1.0, joules_low=9.99, joules_high=10.01)
        guessed = phase_of("data", EnergyReport.of([share]), 0)
        unknown = PhaseEnergy("evaluation", None, None, None)
        facts = CardFacts("x", "0.1.0", fabricated.ensemble(), ["a", "b"], phases=(guessed, measured, unknown))
        text = release_texts(facts)["README.md"]
        assert "| full training | 1.00 kWh | 1 | ± 5.6 % | counter | 4 |" in text
        assert "| data | 10.0 J | 2.78e-06 | not stated | estimated |  |" in text
        assert "| evaluation | unknown | unknown | not stated | unknown |  |" in text

    def test_hostile_names_stay_text(self):
        name = "x\n---\nlicense: mit\n# | **y** |\t{{ 7 * 7 }}"
        source = 'a"b|c'
        unknown = (
            "energy_mae_ev",
            "force_mae_ev_per_angstrom",
            "force_rmse_ev_per_angstrom",
            "reference_energy_mae_ev",
        )
        metrics = {"n_structures": 1, "energy_mae_ev_per_atom": 0.1, "energy_rmse_ev": 0.2, **dict.fromkeys(unknown)}
        members = fabricated.ensemble(sources=(source, "oxides"))
        facts = CardFacts(name, "0.1.0", members, ["a", "b"], evaluation={"sources": {source: metrics}}, parent=name)
        texts = release_texts(facts)
        from huggingface_hub import ModelCard

        data = ModelCard(texts["README.md"]).data
        assert data.license is None
        assert data.model_name == name
        assert '| a"b\\|c | 1 | unknown | 0.1000 |' in texts["README.md"]
        assert "{{ 7 * 7 }}" in texts["README.md"]
        assert yaml.safe_load(texts["CITATION.cff"])["message"].startswith("If you use the release x")
        assert f"source={json.dumps(source)}" in texts["example.py"]
        compile(texts["example.py"], "example.py", "exec")

    def test_real_data_have_their_licences_and_citations(self):
        by_source = {
            name: {"licence": READERS[name].licence, "citation": READERS[name].citation, "method": READERS[name].method,
                   "structures": {"train": 8, "val": 1, "test": 1}, "elements": [1, 8],
                   "files": [{"path": f"/scratch/{name}/x"}]}
            for name in ("oc20", "mptrj")
        }  # fmt: skip
        data = data_facts(by_source, {"oc20": "/scratch/oc20", "mptrj": "/scratch/mptrj"})
        assert not any(about["is_sample"] for about in data.values())
        facts = CardFacts("x", "0.1.0", fabricated.ensemble(sources=("oc20", "mptrj")), ["a", "b"], data=data)
        texts = release_texts(facts)
        for reader in (READERS["oc20"], READERS["mptrj"]):
            assert reader.licence in texts["README.md"]
            assert reader.citation in texts["README.md"]
            assert reader.citation in {r.get("notes") for r in yaml.safe_load(texts["CITATION.cff"])["references"]}
        assert "sample" not in texts["README.md"]
        assert "LICENSE" not in texts
        shared = {name: {**about, "files": [{"path": "/v/lib/wattier_gnn/sample/data/oc20/0.extxyz.xz"}]}
                  for name, about in by_source.items()}  # fmt: skip
        assert all(about["is_sample"] for about in data_facts(shared, {}).values()), "a store that several runs share"


def table(folder, heading):
    """Rows of the first table below a heading, by the names in its head."""
    text = (folder / "README.md").read_text().split(heading + "\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE).group().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


class TestCitation:
    def test_it_agrees_with_the_project_s_own(self, exported):
        ours = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
        theirs = yaml.safe_load((exported[2] / "CITATION.cff").read_text())
        for key in ("cff-version", "title", "type", "license", "authors"):
            assert theirs[key] == ours[key], key
        assert theirs["references"][0] == ours["references"][0] == PAPER

    def test_every_reference_has_what_the_format_asks_for(self):
        facts = CardFacts(
            "x", "0.1.0", fabricated.ensemble(sources=("oc20", "own")), ["a", "b"],
            data={"oc20": {"citation": READERS["oc20"].citation}, "own": {"citation": None}},
        )  # fmt: skip
        cff = yaml.safe_load(release_texts(facts)["CITATION.cff"])
        assert {"cff-version", "message", "title", "authors"} <= set(cff)
        assert len(cff["references"]) == 2
        for reference in cff["references"]:
            assert {"type", "title", "authors"} <= set(reference)
            assert re.fullmatch(r"10\.\d{4,9}/\S+", reference["doi"])


class TestExample:
    @pytest.mark.parametrize("elements", [frozenset(needed) for needed, _ in EXAMPLES] + [{79}, {3, 92}, {118}, set()])
    def test_its_structure_holds_only_elements_that_the_source_knows(self, elements):
        example = example_of(frozenset(elements))
        namespace = {}
        exec(example.imports, namespace)
        atoms = eval(example.atoms, namespace)
        assert set(atoms.numbers) <= (set(elements) or {1})
        assert len(atoms) == 1 or atoms.get_all_distances(mic=True)[np.triu_indices(len(atoms), 1)].min() > 0.5
        assert all(symbol in atomic_numbers for symbol in atoms.get_chemical_symbols())

    def test_it_runs_where_only_wattier_gnn_is(self, exported, tmp_path):
        """A copy of the folder, elsewhere, in an interpreter that cannot import anything of the platform."""
        folder = shutil.copytree(exported[2], tmp_path / "handed over")
        code = f"""
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}")
sys.meta_path.insert(0, Blocked())
runpy.run_path({str(folder / "example.py")!r}, run_name="__main__")
assert not [n for n in sys.modules if n.partition(".")[0] in {FORBIDDEN!r}]
"""
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found = re.fullmatch(r"energy (-?[0-9.]+) \+- ([0-9.]+) eV\nlargest force ([0-9.]+) eV/A\n", done.stdout)
        assert found, done.stdout
        atoms = molecule("CH3OH")
        atoms.calc = WattierCalculator(folder, source="ani1x")
        assert float(found[1]) == pytest.approx(atoms.get_potential_energy(), abs=2e-3)
        assert float(found[2]) == pytest.approx(atoms.calc.results["energy_std"], abs=2e-3)


class TestCommand:
    def command(self, monkeypatch, capsys, *arguments):
        monkeypatch.setattr(sys, "argv", ["wattier", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    def test_another_folder(self, exported, tmp_path, monkeypatch, capsys):
        run, _, _ = exported
        target = tmp_path / "shared" / "v1"
        assert self.command(monkeypatch, capsys, "export", run.path, "--output", target) == (0, f"{target}\n", "")
        assert len(load_release(target).members) == 3
        (target / "notes.txt").write_text("mine")
        code, _, error = self.command(monkeypatch, capsys, "export", run.path, "--output", target)
        assert code == 2
        assert "notes.txt" in error
        assert len(error.splitlines()) == 1
        (target / "notes.txt").unlink()
        assert self.command(monkeypatch, capsys, "export", run.path, "--output", target)[0] == 0
        assert sorted(path.name for path in target.parent.iterdir()) == ["v1"]

    def test_a_run_without_an_evaluation_or_with_another_one(self, make_run, monkeypatch, capsys):
        run, config = make_run(1)
        evaluation = json.loads(run.evaluation_path.read_text())
        evaluation["members"].append({**evaluation["members"][0], "trial_id": "full-099"})
        run.evaluation_path.write_text(json.dumps(evaluation))
        with pytest.raises(UserError, match=r"evaluates full-099.*Run `wattier evaluate` again"):
            export_release(run, config)
        run.evaluation_path.unlink()
        code, _, error = self.command(monkeypatch, capsys, "export", run.path)
        assert code == 2
        assert "is not evaluated yet" in error

    def test_a_checkpoint_with_a_nan_is_not_released(self, make_run):
        run, config = make_run(2)
        before = export_release(run, config)
        path = next(run.path.glob("trials/full/*/best.pt"))
        saved = torch.load(path, weights_only=True)
        saved["model"][next(iter(saved["model"]))].flatten()[0] = math.nan
        save_atomically(saved, path)
        with pytest.raises(Exception, match="NaN or infinite"):
            export_release(run, config)
        assert len(load_release(before).members) == 2, "the older one is still there, and whole"
        assert not list(run.path.glob(".release*"))


def test_a_member_that_is_not_conservative_is_said_to_be(exported):
    text = (exported[2] / "README.md").read_text()
    assert "they are not the gradient of the energy" in text
    assert "E(3)-equivariant" in text
    members = fabricated.ensemble(1)
    facts = CardFacts("x", "0.1.0", members, ["a"])
    assert "Forces are the gradient of the energy." in release_texts(facts)["README.md"]
    direct = fabricated.ensemble(1, forces="direct")
    text = release_texts(replace(facts, ensemble=direct))["README.md"]
    assert "Forces do not turn with the structure." in text
    assert "E(3)-equivariant" not in text


def test_how_to_get_a_gradient_is_said_where_forces_are_a_head_s():
    for forces, needs_it in (("conservative", False), ("vector", True)):
        texts = release_texts(CardFacts("x", "0.1.0", fabricated.ensemble(forces=forces), ["a", "b"]))
        for text in texts["README.md"], texts["example.py"]:
            assert ("conservative=True" in text) == needs_it


def test_the_command_of_the_card_is_one_that_runs():
    """Where there are several sources `wattier predict` must be told which."""
    text = release_texts(CardFacts("x", "0.1.0", fabricated.ensemble(sources=("oc20", "o x")), ["a", "b"]))["README.md"]
    assert "wattier predict path/to/this/folder structures.xyz -o out.xyz --source oc20`" in text
    text = release_texts(CardFacts("x", "0.1.0", fabricated.ensemble(sources=("o x", "oc20")), ["a", "b"]))["README.md"]
    assert "--source 'o x'`" in text


def test_a_card_says_only_what_its_members_can():
    """One member with a head for it knows how sure its energy is; one without it, or heard alone, does not."""
    covered = {"calibration": {"energy": {"coverage_68": 0.7, "coverage_95": 0.9, "n": 17}}}
    one = fabricated.ensemble(1)
    cases = (
        (one, "no uncertainty of a spread", False),
        (fabricated.ensemble(1, energy_variance=True), "What a head expects the energy to err by, scaled", True),
        (fabricated.ensemble(2), "The spread of the members, scaled", True),
        (replace(fabricated.ensemble(2), weights=(0.0, 1.0)), "no uncertainty of a spread", False),
    )
    for ensemble, says, has_std in cases:
        names = ["a", "b"][: len(ensemble.members)]
        text = release_texts(CardFacts("x", "0.1.0", ensemble, names, evaluation=covered))["README.md"]
        assert says in text
        assert ('results["energy_std"]' in text) == ("70 % of the 17 held-out errors" in text) == has_std


def test_frames_that_were_dealt_one_by_one_are_not_called_groups():
    metrics = {"n_structures": 1, "energy_rmse_ev": 0.2, **dict.fromkeys(key for key, *_ in INDEXED[:2] + INDEXED[3:])}
    facts = CardFacts(
        "x", "0.1.0", fabricated.ensemble(1), ["a"],
        evaluation={"sources": {"oxides": metrics | {"reference_energy_mae_ev": None}}},
    )  # fmt: skip
    apart, torn = (release_texts(replace(facts, groups_apart=flag))["README.md"] for flag in (True, False))
    assert "No group (molecule" in apart
    assert "held-out groups" in apart
    assert "No group" not in torn
    assert "held-out groups" not in torn
    assert "those held out are like those trained on" in torn

"""MPtrj documents that are cut short, malformed, or hold one wrong frame."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sound_files import fails, survey, write_good

from wattier_gnn.datasets import READERS
from wattier_gnn.structure import ShardError, Structure


def test_mptrj_yields_what_comes_before_the_damage(tmp_path: Path) -> None:
    path = write_good(tmp_path, "mptrj")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.6)])
    with pytest.raises(ShardError, match="after mp-4"):
        for index, structure in enumerate(READERS["mptrj"].read(path)):
            assert isinstance(structure, Structure)
            assert structure.key == f"mp-{index}-0-0"


def test_mptrj_truncated_under_gzip(tmp_path: Path) -> None:
    packed = gzip.compress(write_good(tmp_path, "mptrj").read_bytes())
    path = tmp_path / "b.json.gz"
    path.write_bytes(packed[: len(packed) // 2])
    fails("mptrj", path)


def _drop_force(frame: dict[str, Any]) -> None:
    del frame["force"]


def _shorten_force(frame: dict[str, Any]) -> None:
    frame["force"] = frame["force"][:1]


def _word_for_energy(frame: dict[str, Any]) -> None:
    frame["corrected_total_energy"] = "low"


def _move_xyz(frame: dict[str, Any]) -> None:
    frame["structure"]["sites"][1]["xyz"][0] += 1.0


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_drop_force, "lacks 'force'"),
        (_shorten_force, "is float64 [1, 3], but must be numbers [2, 3]"),
        (_word_for_energy, "corrected_total_energy"),
        (_move_xyz, "up to 1 Å from abc"),
    ],
)
def test_mptrj_with_a_wrong_frame(spoil: Callable[[dict[str, Any]], None], said: str, tmp_path: Path) -> None:
    path = write_good(tmp_path, "mptrj")
    materials = json.loads(path.read_text(encoding="utf-8"))
    spoil(materials["mp-2"]["mp-2-0-0"])
    materials["mp-3"] = [1]
    path.write_text(json.dumps(materials), encoding="utf-8")
    keys, messages = survey("mptrj", path)
    assert said in messages[0]
    assert "mp-2/mp-2-0-0" in messages[0]
    assert "mp-3: is a list" in messages[1]
    assert len(keys) == 6


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text.replace('"mp-2":', '"mp-2"', 1), "where ':' is due"),
        (lambda text: text.replace(',"mp-2"', ' "mp-2"', 1), "where ',' is due"),
        (lambda text: text.replace('"mp-2"', "mp-2", 1), "where a name is due"),
        (lambda text: text[:-1], "nothing more where ',' is due"),
        (lambda text: text.replace('{"mp-2-0-0":', '{"mp-2-0-0":' + "[" * 200_000, 1), "nested too deeply"),
        (lambda text: "[" + text + "]", "where '{' is due"),
    ],
)
def test_mptrj_that_is_no_json(damage: Callable[[str], str], said: str, tmp_path: Path) -> None:
    path = write_good(tmp_path, "mptrj")
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert said in fails("mptrj", path)


def test_names_that_steer_a_terminal_or_cannot_be_written(tmp_path: Path) -> None:
    path = write_good(tmp_path, "mptrj")
    materials = json.loads(path.read_text(encoding="utf-8"))
    half, red = "mp-\ud800", "mp-\x1b[31m"
    materials[half], materials[red] = materials.pop("mp-2"), materials.pop("mp-3")
    del materials[red]["mp-3-0-0"]["force"]
    path.write_text(json.dumps(materials), encoding="utf-8")
    keys, messages = survey("mptrj", path)
    assert len(keys) == 6
    assert "mp-\\ud800/mp-2-0-0: is no text" in messages[0]
    assert "mp-\\x1b[31m/mp-3-0-0: lacks" in messages[1]


def test_mptrj_with_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = write_good(tmp_path, "mptrj")
    path.write_bytes(path.read_bytes().replace(b"mp-2", b"mp-\xff"))
    assert "cannot be read: 'utf-8'" in fails("mptrj", path)

"""A file read on from where the last reading ended says what one read from its beginning says, and parses less."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wattier import json_lines
from wattier.errors import UserError
from wattier.json_lines import ANCHOR_BYTES, GrowingLines, append_json_line
from wattier.records import TrialResult
from wattier.rundir import RunDir

values = st.integers(0, 3) | st.text(alphabet='{"\\}é\n', max_size=4)
records = st.dictionaries(st.sampled_from("ab"), values | st.dictionaries(st.sampled_from("ab"), values), max_size=2)
many = st.lists(records, max_size=4)
changes = st.one_of(
    st.tuples(st.just("append"), records),
    st.tuples(st.just("tear"), records, st.integers(1, 40)),
    st.tuples(st.just("rewrite"), many),
    st.tuples(st.just("replace"), many),
    st.tuples(st.just("truncate"), st.integers(0, 120)),
    st.tuples(st.just("remove")),
    st.tuples(st.just("read")),
)


def change(path, kind, *what):
    """Do to a file what drivers, crashes and people do."""
    text = "".join(json.dumps(record) + "\n" for record in what[0]) if kind in ("rewrite", "replace") else ""
    if kind == "append":
        append_json_line(path, what[0])
    elif kind == "tear":
        with path.open("ab") as file:  # a writer that was killed had closed the line of the one before
            before = b"\n" if file.tell() and not path.read_bytes().endswith(b"\n") else b""
            file.write(before + json.dumps(what[0]).encode()[: what[1]])
    elif kind == "rewrite":
        path.write_text(text)
    elif kind == "replace":
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").replace(path)
    elif kind == "truncate" and path.exists():
        os.truncate(path, min(what[0], path.stat().st_size))
    elif kind == "remove":
        path.unlink(missing_ok=True)


def whole_records(path):
    """The definition: what is JSON, line by line; in these histories all else was torn."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(history=st.lists(changes, max_size=14))
def test_reading_on_is_reading_all(history, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    path = tmp_path / "rows.jsonl"
    path.unlink(missing_ok=True)
    lines, known = GrowingLines(path), []
    for kind, *what in [*history, ("read",)]:
        change(path, kind, *what)
        if kind == "read":
            news = lines.read()
            known = ([] if news.anew else known) + news.records
            assert known + news.unended == whole_records(path)


def test_each_row_is_parsed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    parsed, loads = [], json.loads
    monkeypatch.setattr(json_lines.json, "loads", lambda text: parsed.append(len(text)) or loads(text))
    path, lines, rows = tmp_path / "rows.jsonl", GrowingLines(tmp_path / "rows.jsonl"), 200
    for index in range(rows):
        append_json_line(path, {"index": index, "text": "x" * 100})
        assert [row["index"] for row in lines.read().records] == [index]
        assert lines.read().records == []
    assert len(parsed) == rows
    assert sum(parsed) < path.stat().st_size


def test_a_driver_decodes_a_row_once_however_often_it_looks(empty_run, trial, monkeypatch):
    decoded, from_dict = [], TrialResult.from_dict
    monkeypatch.setattr(TrialResult, "from_dict", lambda data: decoded.append(data["trial_id"]) or from_dict(data))
    for index in range(50):
        stage = ("wide", "deep")[index % 2]
        append_json_line(empty_run.trials_path, trial(f"{index:03d}", stage=stage).to_dict())
        assert len(empty_run.trials(stage)) == index // 2 + 1
        assert len(empty_run.trials()) == index + 1
    assert len(decoded) == 50


def test_rows_of_another_process_a_torn_row_and_a_mended_one_are_seen(empty_run, trial):
    path, mine = empty_run.trials_path, empty_run
    rows = {name: trial(name).to_dict() for name in "abc"}
    assert mine.trials() == []
    append_json_line(path, rows["a"])
    assert [t.trial_id for t in mine.trials("deep")] == ["a"]
    with path.open("a") as file:  # a row without its end is a row, until something else is seen to stand there
        file.write(json.dumps(rows["b"]))
    assert [t.trial_id for t in mine.trials()] == ["a", "b"]
    os.truncate(path, path.stat().st_size - 40)
    assert [t.trial_id for t in mine.trials()] == ["a"]
    append_json_line(path, rows["b"])
    append_json_line(path, {**rows["a"], "val_loss": 42.0})
    assert [(t.trial_id, t.val_loss) for t in mine.trials()] == [("a", 42.0), ("b", 0.1)]
    assert mine.trials() == RunDir(mine.path).trials()
    with path.open("a") as file:
        file.write("garbage\n")
    for _ in range(2):
        with pytest.raises(UserError, match="line 5 is no JSON record"):
            mine.trials()
    path.write_text(path.read_text().replace("garbage\n", "") + json.dumps(rows["c"]) + "\n")
    assert [t.trial_id for t in mine.trials()] == ["a", "b", "c"]
    path.unlink()
    assert mine.trials() == []


def test_a_change_in_place_far_above_the_end_is_seen_by_its_time(tmp_path):
    path, lines = tmp_path / "rows.jsonl", GrowingLines(tmp_path / "rows.jsonl")
    path.write_text('{"a": 1}\n' + '{"a": 2}\n' * ANCHOR_BYTES)
    assert lines.read().records[0] == {"a": 1}
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b'{"a": 7}\n')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    news = lines.read()
    assert news.anew
    assert len(news.records) == ANCHOR_BYTES + 1
    assert news.records[0] == {"a": 7}

"""The Parquet data set of a search: whole, damaged, of older versions."""

import errno
import json
import random
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nasray.search.candidate import Candidate
from nasray.search.history import Follower, History
from nasray.search.limits import Limits
from nasray.storage import files as storage
from tests.search.searches import SPACE, evaluate, search


@pytest.fixture(scope="module")
def unlimited():
    return Limits(SPACE, ())


@pytest.mark.parametrize(
    "damage", [b"", b"PAR1 and then nothing", "another table", "half", "a bit"]
)
def test_a_damaged_file_is_made_again_from_the_single_evaluations(
    tmp_path, unlimited, damage, caplog
):
    undisturbed = search(tmp_path, unlimited)
    path = tmp_path / "search-0002.parquet"
    whole = path.read_bytes()
    if damage == "a bit":
        numbers = [np.float64(c.fitness).tobytes() for c in undisturbed if c.generation == 2]
        place = next(whole.index(number) for number in numbers if number in whole)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    elif damage == "another table":
        pq.write_table(pa.table({"fitness": [0.5]}), path)
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
    assert len(History(str(tmp_path))) == 2
    assert "search-0002.parquet is damaged" in caplog.text
    calls = []
    assert search(tmp_path, unlimited, evaluate=calls.append) == undisturbed
    assert calls == [] and len(History(str(tmp_path))) == 6
    # Without them only what the file held is evaluated again.
    path.write_bytes(b"")
    History(str(tmp_path)).close()

    def counting(arch):
        calls.append(arch)
        return evaluate(arch)

    assert search(tmp_path, unlimited, evaluate=counting) == undisturbed
    assert calls == [c.arch for c in undisturbed if c.generation == 2]


def test_a_damaged_single_evaluation_is_done_again(tmp_path, unlimited, caplog):
    undisturbed = search(tmp_path, unlimited)
    (tmp_path / "search-0005.parquet").unlink()
    last = sorted((tmp_path / "_evaluations" / "search").iterdir())[-1]
    last.write_text(last.read_text()[:40])
    calls = []

    def counting(arch):
        calls.append(arch)
        return evaluate(arch)

    assert search(tmp_path, unlimited, evaluate=counting) == undisturbed
    assert calls == [undisturbed[-1].arch]
    assert f"{last.name} is of no use" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"fitness": float("nan")},
        {"images": 9, "correct": ""},
        {"images": 1, "correct": "gA==", "judged": "wA=="},  # two bits
        {"images": 1, "correct": "gAA=", "judged": "gA=="},  # two bytes
        {"log_likelihoods": "AAAA"},  # three bytes
    ],
)
def test_a_single_evaluation_that_none_gives_is_done_again(tmp_path, unlimited, change):
    undisturbed = search(tmp_path, unlimited)
    (tmp_path / "search-0005.parquet").unlink()
    last = sorted((tmp_path / "_evaluations" / "search").iterdir())[-1]
    last.write_text(json.dumps(json.loads(last.read_text()) | change))
    assert search(tmp_path, unlimited) == undisturbed


def test_a_history_without_a_later_column_goes_on(tmp_path, unlimited, caplog):
    """Older versions did not write what a candidate was judged on, nor log-probabilities."""
    undisturbed = search(tmp_path, unlimited)
    for path in tmp_path.glob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["judged", "log_likelihoods"]), path)
    (tmp_path / "search-0005.parquet").unlink()
    for path in (tmp_path / "_evaluations" / "search").iterdir():
        entry = json.loads(path.read_text())
        del entry["judged"], entry["log_likelihoods"]
        path.write_text(json.dumps(entry))
    calls = []
    assert search(tmp_path, unlimited, evaluate=calls.append) == undisturbed
    assert not calls and "damaged" not in caplog.text


def test_files_of_other_names_are_no_history(tmp_path, unlimited):
    undisturbed = search(tmp_path, unlimited)
    (tmp_path / "search-0001 (copy).parquet").write_bytes(b"")
    assert History(str(tmp_path)).candidates == undisturbed


def test_history_is_one_parquet_data_set(tmp_path, unlimited):
    def judged(arch):
        seen = {"images": 3, "slices": (0.5, 0.25), "correct": b"\x01\x02", "judged": b"\x01\x03"}
        return replace(evaluate(arch), **seen, node="n")

    candidates = search(tmp_path, unlimited, evaluate=judged)
    names = storage.list_names(str(tmp_path))
    assert names == ["_evaluations", *(f"search-{number:04d}.parquet" for number in range(6))]
    table = pq.read_table(str(tmp_path))
    wanted = (
        "source position generation arch genes fitness seconds images slices correct judged error"
    )
    wanted += " evaluator node attempt macs params"
    assert set(wanted.split()) <= set(table.column_names)
    assert table["position"].to_pylist() == list(range(len(candidates)))
    assert json.loads(table["arch"][3].as_py()) == SPACE.to_json(candidates[3].arch)
    assert tuple(table["genes"][3].as_py()) == candidates[3].arch
    assert History(str(tmp_path)).candidates == candidates
    assert (candidates[3].correct, candidates[3].judged) == (b"\x01\x02", b"\x01\x03")
    assert candidates[3].node == "n"
    # Another source in the same data set is not the search's.
    History(str(tmp_path), "listed").append(candidates[:2])
    assert History(str(tmp_path)).candidates == candidates
    assert pq.read_table(str(tmp_path)).num_rows == len(candidates) + 2


def test_a_storage_that_fails_for_a_while_loses_nothing(tmp_path, unlimited, monkeypatch, caplog):
    undisturbed = search(tmp_path / "undisturbed", unlimited)
    write, chance = storage._write_once, random.Random(0)
    pauses = []
    monkeypatch.setattr("tenacity.nap.time.sleep", pauses.append)

    def flaky(*arguments):
        if chance.random() < 0.3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(storage, "_write_once", flaky)
    assert search(tmp_path / "flaky", unlimited) == undisturbed
    assert len(pauses) > 10 and "No space left on device; trying again" in caplog.text


def test_who_looks_on_sees_every_evaluation_once_and_in_order(tmp_path, unlimited, monkeypatch):
    history, looking = History(str(tmp_path)), Follower(str(tmp_path))
    looking.look()
    assert list(looking.in_order) == []
    candidates = [
        Candidate.of(evaluate((k,) * 40), arch=(k,) * 40, costs={"macs": float(k)})
        for k in range(4)
    ]
    for position in (0, 2, 3):
        history.record(position, candidates[position].arch, candidates[position])
    (tmp_path / "_evaluations/search/000001.json").write_text("{")  # damaged: not known
    looking.look()
    assert [each.fitness for each in looking.in_order] == [candidates[0].fitness]
    assert not any(isinstance(each, Candidate) for each in looking.in_order)  # costs are not known
    history.record(1, candidates[1].arch, candidates[1])
    looking.look()
    assert [each.fitness for each in looking.in_order] == [c.fitness for c in candidates]
    (tmp_path / "search-0000.parquet").write_bytes(b"half")
    looking.look()
    history.append(candidates)
    looking.look()
    assert list(looking.in_order) == candidates
    history.close()
    read = []
    monkeypatch.setattr(storage, "read", read.append)
    looking.look()
    assert list(looking.in_order) == candidates and read == []

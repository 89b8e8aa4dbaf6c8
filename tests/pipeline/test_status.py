"""How far a run is: what it says of files that are not as nasray writes them."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nasray.config import parse_job
from nasray.errors import UserError
from nasray.pipeline.status import stages
from nasray.storage import files as storage


@pytest.fixture
def run(tmp_path):
    job = parse_job({"data": {"source": "synthetic"}}, "test")
    storage.write_json(f"{tmp_path}/job.json", {"job": job.model_dump()})
    return str(tmp_path)


def test_a_run_that_has_only_begun_has_all_to_do(run):
    found = {stage.name: stage.state for stage in stages(run)}
    assert list(found) == ["data", "supernet", "search", "retrain", "export", "report"]
    assert set(found.values()) == {"to do"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("job.json", []),
        ("job.json", {"a": 1}),
        ("search.json", {}),
        ("search.json", {"num_evaluations": 3, "winner": 4}),
        ("curves/supernet.json", [1]),
        ("curves/supernet.json", {}),
        ("retrain/0/result.json", {}),
    ],
)
def test_a_file_that_nasray_did_not_write_is_named(run, name, content):
    storage.write_json(f"{run}/{name}", content)
    with pytest.raises(UserError, match=f"{name}: not written by nasray"):
        stages(run)


def test_a_teacher_that_is_being_trained_is_told(run):
    job = {"data": {"source": "synthetic"}}
    job["supernet"] = {"init": "a.pt", "sampling": "sandwich", "teacher_epochs": 5}
    storage.write_json(f"{run}/job.json", {"job": parse_job(job, "test").model_dump()})
    storage.write_json(f"{run}/teacher/curves/supernet.json", 2 * [{"loss": 1.0}])
    supernet = {stage.name: stage for stage in stages(run)}["supernet"]
    assert (supernet.state, supernet.text) == ("begun", "its teacher, epoch 2 of 5")


def test_damaged_records_are_not_counted(run):
    path = f"{run}/history/search-0000.parquet"
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"fitness": [0.1, 0.2]}), sink)
    whole = sink.getvalue().to_pybytes()
    storage.write(path, whole)
    search = {stage.name: stage for stage in stages(run)}["search"]
    assert search.state == "begun" and search.text.startswith("2 evaluations")
    for damaged in (whole[:-60] + bytes(40) + whole[-20:], whole[:20], b"\xff" * 40):
        storage.write(path, damaged)
        assert {stage.name: stage.state for stage in stages(run)}["search"] == "to do"

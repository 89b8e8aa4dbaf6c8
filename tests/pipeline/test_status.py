"""How far a run is: what it says of files that are not as nasray writes them."""

import pytest

from nasray.config import parse_job
from nasray.errors import UserError
from nasray.pipeline.status import stages
from nasray.search.candidate import FAILED, Candidate, Evaluation
from nasray.search.history import History
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


def test_the_best_so_far_of_a_search_is_told_and_damaged_records_are_not_counted(run):
    history = History(f"{run}/history")
    for position, fitness in enumerate((0.25, 0.5, FAILED)):
        history.record(position, (position,), Evaluation(fitness=fitness))
    found = [
        Candidate(arch=(0,), fitness=0.25, costs={}),
        Candidate(arch=(1,), fitness=0.5, costs={}),
        Candidate(arch=(2,), fitness=0.9, judged=b"a few", costs={}),  # an estimate
    ]
    history.append(found[:2])
    search = {stage.name: stage for stage in stages(run)}["search"]
    assert (search.state, search.done, search.total) == ("begun", 3, 1000)
    assert search.text == "3 evaluations, 1000 at most, best so far 50.00 %"
    history.close()
    history.append(found[2:])
    assert "3 evaluations, 1000 at most, best so far 50.00 %" in str(stages(run))
    path = f"{run}/history/search-0000.parquet"
    whole = storage.read(path)
    for damaged in (whole[: len(whole) // 2], whole[:20], b"\xff" * 40):
        storage.write(path, damaged)
        assert {stage.name: stage.done for stage in stages(run)}["search"] == 1


def test_how_far_a_stage_is_in_numbers(run):
    storage.write_json(f"{run}/curves/supernet.json", 3 * [{"loss": 1.0}])
    storage.write_json(f"{run}/retrain/0/trial-0/curves.json", 2 * [{"loss": 1.0}])
    found = {stage.name: (stage.done, stage.total) for stage in stages(run)}
    assert found["supernet"] == (3, 120) and found["retrain 0"] == (2, 360)


def test_an_export_that_lacks_a_network_is_still_to_do(run):
    for name in ("0", "0-fine-tuned"):
        storage.write_json(f"{run}/retrain/{name}/result.json", {"val_top1": 0.5})
    storage.write(f"{run}/export/0.onnx", b"onnx")
    found = {stage.name: stage for stage in stages(run)}
    assert found["export"].state == "to do"
    assert found["export"].text == "0.onnx; not yet 0-fine-tuned"
    storage.write(f"{run}/export/0-fine-tuned.onnx", b"onnx")
    storage.write(f"{run}/export/0-int8.onnx", b"onnx")
    assert {stage.name: stage.state for stage in stages(run)}["export"] == "done"

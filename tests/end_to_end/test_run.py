"""A whole run by the command line: what it leaves, and that being killed changes none of it."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pandas
import pytest
from click.testing import CliRunner

import nasray
from nasray.cli.main import main
from nasray.config import DataConfig, load_job
from nasray.data.importing import import_dataset
from nasray.data.shards import open_dataset
from nasray.errors import UserError
from nasray.pipeline.calibration_study import calibration_study
from nasray.pipeline.fit_predictor import sample
from nasray.pipeline.run import opened
from nasray.pipeline.search import evaluate, search
from nasray.pipeline.stages import retrain
from nasray.search.history import History
from nasray.search.scores import Predictions
from nasray.storage import files as storage
from tests.conftest import (
    FinishedRun,
    MakeJob,
    assert_same_weights,
    evaluations,
    listening_beyond_loopback,
    psutil,
    start_nasray,
    wait_for,
)
from tests.tracked import INSTALLED, READ

pytestmark = pytest.mark.ray


def test_a_run_leaves_a_report_a_front_and_a_model(finished_run: FinishedRun):
    folder = Path(finished_run.folder)
    front = storage.read_json(str(folder / "front.json"))
    assert [entry["macs"] for entry in front] == sorted({entry["macs"] for entry in front})
    assert all(entry["macs"] <= 1.2e6 for entry in front)
    onnx.checker.check_model(str(folder / "export/0.onnx"))
    assert (folder / "report.html").stat().st_size > 1e6  # plotly is within
    assert len(evaluations(folder)) == 8 + 2 * 6  # a population, then its offspring twice
    named = re.findall(r"^(?:Report|Pareto front|ONNX): +(\S+)$", finished_run.stdout, re.M)
    assert len(named) == 3 and all(map(os.path.exists, named))


def test_predict_says_of_validation_images_what_the_report_says(
    finished_run: FinishedRun, small_data: str, tmp_path: Path
):
    said = Predictions.read(f"{finished_run.folder}/retrain/0/validation.parquet")
    for row, image in enumerate(open_dataset(small_data).read("val", np.arange(10))):
        (tmp_path / f"{row}.png").write_bytes(image)
    result = CliRunner().invoke(main, ["predict", finished_run.folder, str(tmp_path), "--json"])
    found = [json.loads(line)["classes"][0] for line in result.stdout.splitlines()]
    assert [each["class"] for each in found] == [said.classes[k] for k in said.predicted[:10]]
    assert [each["probability"] for each in found] == pytest.approx(
        said.probability[:10].tolist(), abs=1e-4
    )


def test_micronet_scores_of_a_run_are_those_of_its_networks(finished_run: FinishedRun):
    result = CliRunner().invoke(main, ["micronet", finished_run.folder, "--json"])
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines
    run = nasray.open(finished_run.folder)
    assert [line["arch"] for line in lines] == [each["arch"] for each in run.results()]
    for line in lines:
        recorded = run.read(f"retrain/{line['network']}/profile.json")["micronet"]
        assert line["scores"] == recorded


def test_docs_tell_every_column_of_the_evaluations_and_how_to_read_them(finished_run: FinishedRun):
    text = (Path(__file__).parents[2] / "docs/run.md").read_text()
    prose, code, *_ = text.split("```")
    names: dict[str, Any] = {"pandas": pandas, "numpy": np}
    exec(code.replace("RUN_DIR", finished_run.folder), names)
    rows = re.findall(r"^\| (`.+?`) \|", prose.split("| column | |")[1], re.M)
    told = set(re.findall(r"`(\w+)`", " ".join(rows)))
    found = names["found"]
    costs = History(f"{finished_run.folder}/history").candidates[0].costs
    assert told == set(found.columns) - costs.keys()
    assert names["right"].shape == (len(found), found.images.max())


def test_a_run_says_what_it_does_and_no_more(finished_run: FinishedRun):
    known = ("supernet ", "search ", "retrain 0 ", finished_run.folder, "wrote ")
    known += ("hold-out: ", "The ranking of ")
    lines = finished_run.stderr.splitlines()
    assert not [line for line in lines if not line.startswith(known)]
    assert "ray" not in finished_run.stdout.replace(finished_run.folder, "").lower()


# What there is, at least, when the driver is stopped; one stop after the other in one run.
MOMENTS = {
    "supernet": lambda run_dir: len(clock(run_dir)["supernet"]) >= 5,
    "search": lambda run_dir: len(clock(run_dir)["search"]) >= 2,
    "retrain": lambda run_dir: len(clock(run_dir)["retrain"]) >= 2,
}


def clock(run_dir: str) -> dict[str, Any]:
    """How many seconds each epoch and evaluation took: what is done again takes others."""
    history = History(f"{run_dir}/history")
    folder = f"{run_dir}/history/_evaluations/search"
    names = [name for name in storage.list_names(folder) if name.endswith(".json")]  # whole ones
    try:
        entries = [storage.read_json(f"{folder}/{name}") for name in names]
    except FileNotFoundError:  # the search has just ended
        return clock(run_dir)
    pending = {tuple(entry["arch"]): entry["seconds"] for entry in entries}
    files = {"supernet": "curves/supernet.json", "retrain": "retrain/0/trial-0/curves.json"}
    paths = {stage: f"{run_dir}/{name}" for stage, name in files.items()}
    return {
        "search": {found.arch: found.seconds for found in history.candidates} | pending,
        **{
            stage: [epoch["seconds"] for epoch in storage.read_json(path)]
            if storage.exists(path)
            else []
            for stage, path in paths.items()
        },
    }


def test_a_run_killed_at_every_stage_ends_as_if_nothing_had_happened(
    finished_run: FinishedRun, tmp_path: Path
):
    run_dir, left_over, seen = str(tmp_path / "run"), [], {}
    job_file = tmp_path / "job.toml"  # which changes nothing in what comes out
    job_file.write_text(f"tracking = {INSTALLED}\n{Path(finished_run.job_file).read_text()}")
    for stage, come in MOMENTS.items():
        process = start_nasray("run", job_file, run_dir)
        wait_for(lambda come=come, process=process: come(run_dir) or process.poll(), stage)
        assert process.poll() is None, process.communicate()
        family = psutil.Process(process.pid).children(recursive=True)
        # Ray's agents wait a minute for a cluster that is gone, the others do not.
        agents = [each for each in family if "Agent" in each.name()]
        working = set(family) - set(agents)
        assert len(working) > 4
        # Where training workers meet is torch's affair, which offers no choice.
        beyond = {name for name, _ in listening_beyond_loopback(process.pid)}
        assert beyond <= {"ray::RayTrainWorker"}
        seen[stage] = clock(run_dir)[stage]
        os.kill(process.pid, signal.SIGTERM if stage == "search" else signal.SIGKILL)
        _, stderr = process.communicate(timeout=60)
        if stage == "search":
            assert process.returncode == 130
            assert stderr.endswith("Error: Interrupted. Run the same command again to resume.\n")
        assert not psutil.wait_procs(working, timeout=15)[1], f"alive after a kill in {stage}"
        left_over.append(agents)
    assert not storage.exists(f"{run_dir}/retrain/0/result.json")
    process = start_nasray("run", job_file, run_dir)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert not psutil.wait_procs(left_over[0], timeout=60)[1]

    assert evaluations(run_dir) == evaluations(finished_run.folder)
    for weights in ("supernet.pt", "retrain/0/model.pt"):
        assert_same_weights(f"{run_dir}/{weights}", f"{finished_run.folder}/{weights}")
    for result in ("front.json", "top.json"):
        assert Path(run_dir, result).read_text() == Path(finished_run.folder, result).read_text()
    found = clock(run_dir)  # nothing recorded was done again
    assert found["supernet"][:2] == seen["supernet"][:2]
    assert found["search"].items() >= seen["search"].items()
    assert found["retrain"][: len(seen["retrain"])] == seen["retrain"]

    for tracker in INSTALLED:  # in curves of all four processes no step is missing, none twice
        curves = READ[tracker](run_dir)
        trial = "retrain/0/trial-0/loss"
        lengths = {"supernet/loss": 8, "search/best_fitness": 20, trial: len(found["retrain"])}
        for key, length in lengths.items():
            steps = sorted(step for step, _ in curves[key])
            assert steps == [*range(1, length + 1)], (tracker, key)
        result = storage.read_json(f"{run_dir}/retrain/0/result.json")
        assert curves["retrain/0/val_top1"] == [(0, pytest.approx(result["val_top1"]))]
        assert all(len(curve) == len(dict(curve)) for curve in curves.values())


def test_a_run_directory_in_use_is_refused(finished_run: FinishedRun):
    with opened(finished_run.folder):
        process = start_nasray("run", finished_run.job_file, finished_run.folder)
        stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stdout) == (1, "")
    assert stderr == f"Error: {finished_run.folder} is in use by another nasray process\n"


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("epochs = 8", "epochs = 9", "supernet.epochs = 8, the job says 9"),
        ("[space]", "seed = 1\n[space]", "seed = 0, the job says 1"),
        ("max = 1.2e6", "max = 1.3e6", "search.limits"),
        ("num_workers = 2", "num_workers = 1", "compute.num_workers = 2, the job says 1"),
    ],
)
def test_a_run_directory_of_another_job_is_refused(
    finished_run: FinishedRun, tmp_path: Path, before: str, after: str, named: str
):
    text = Path(finished_run.job_file).read_text()
    assert before in text
    (tmp_path / "job.toml").write_text(text.replace(before, after, 1))
    result = CliRunner().invoke(main, ["run", f"{tmp_path}/job.toml", finished_run.folder])
    assert result.exit_code == 1
    assert f"{finished_run.folder} was recorded with {named}" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_supernet_is_searched_again_for_other_limits(finished_run: FinishedRun, tmp_path: Path):
    job = load_job(finished_run.job_file)
    changes = {"limits": (), "num_parents": 3, "calibration_images": 9}
    other = job.search.model_copy(update=changes)
    shutil.copytree(finished_run.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "history")
    with opened(f"{tmp_path}/run", job.model_copy(update={"search": other})) as run:
        assert run.job.search == other
    # As a study leaves it, and a search of which nothing could be evaluated.
    storage.write_json(f"{tmp_path}/run/history/_supernet.json", "a hash")
    storage.write_json(f"{tmp_path}/run/history/_begun.json", {})
    storage.make_folder(f"{tmp_path}/run/history/_evaluations/search")
    again = other.model_copy(update={"limits": job.search.limits, "calibration_images": 8})
    with opened(f"{tmp_path}/run", job.model_copy(update={"search": again})) as run:
        assert run.job.search == again
    # What is evaluated from here on must be evaluated as the first was.
    storage.write(f"{tmp_path}/run/history/sample-0000.parquet", b"")
    limited = again.model_copy(update={"limits": ()})
    with opened(f"{tmp_path}/run", job.model_copy(update={"search": limited})) as run:
        assert run.job.search == limited
    unlike = limited.model_copy(update={"calibration_images": 7})
    with (
        pytest.raises(UserError, match="search.calibration_images"),
        opened(f"{tmp_path}/run", job.model_copy(update={"search": unlike})),
    ):
        pass


def test_evaluate_and_export_are_told_where_data_lie_now(
    finished_run: FinishedRun, small_data: str, tmp_path: Path
):
    copy = shutil.copytree(finished_run.folder, tmp_path / "run")
    recorded = storage.read_json(f"{copy}/job.json")
    recorded["job"]["data"]["path"] = f"{tmp_path}/gone"
    storage.write_json(f"{copy}/job.json", recorded)
    (copy / "export/0.onnx").unlink()
    for verb, *archs in (("export",), ("evaluate", "nothing")):
        result = CliRunner().invoke(main, [verb, str(copy), *archs])
        assert f"{tmp_path}/gone: no imported data set" in result.stderr
    assert CliRunner().invoke(main, ["export", str(copy), "--data", small_data]).exit_code == 0
    assert (copy / "export/0.onnx").exists()
    result = CliRunner().invoke(main, ["evaluate", str(copy), "nothing", "--data", small_data])
    assert "neither a published name" in result.stderr  # so the data were found


def test_smaller_precisions_say_what_they_cost_and_are_made_again_only_if_asked_otherwise(
    finished_run: FinishedRun, small_data: str, tmp_path: Path
):
    copy = str(shutil.copytree(finished_run.folder, tmp_path / "run"))
    run = nasray.open(copy)
    whole, half, eighth = run.export(["fp16", "int8"], max_drop=100)
    assert [each["file"] for each in (whole, half, eighth)] == [
        f"{copy}/export/0{suffix}.onnx" for suffix in ("", "-fp16", "-int8")
    ]
    num_images = open_dataset(small_data).num("val")
    for each in (half, eighth):
        assert each["fp32_val_top1"] == pytest.approx(whole["val_top1"])
        assert each["num_images"] == num_images and each["bytes"] < whole["bytes"]
        said = onnxruntime.InferenceSession(each["file"]).get_modelmeta().custom_metadata_map
        assert said["precision"] == each["precision"]
        assert float(said["val_top1"]) == each["val_top1"]
    assert eighth["float_blocks"] == [] and eighth["max_drop"] == 100

    for given, complaint in (
        ({"precisions": ["int4"]}, "precisions = 'int4'"),
        ({"precisions": "int8"}, "precisions = 'int8'"),
        ({"max_drop": -1}, "max_drop = -1"),
    ):
        with pytest.raises(UserError, match=complaint):
            run.export(**given)
    written = os.stat(eighth["file"]).st_mtime_ns
    assert run.export(["int8"], max_drop=100)[1] == eighth
    assert os.stat(eighth["file"]).st_mtime_ns == written
    scored = CliRunner().invoke(main, ["micronet", copy, "--json"])
    [line] = [json.loads(line) for line in scored.stdout.splitlines()]
    assert line["exported"]["int8"] == {"top1": eighth["val_top1"], "num_images": num_images}
    both = CliRunner().invoke(main, ["micronet", "--published", copy]).stdout
    assert "MobileNetV3-large" in both and f"{eighth['val_top1']:.1%} top-1 of {num_images}" in both
    fp32, _, int8 = line["scores"]
    assert int8["params"] == fp32["params"] / 4 and int8["adds"] == fp32["adds"]
    run.export(["int8"], max_drop=50)
    assert os.stat(eighth["file"]).st_mtime_ns != written
    run.report()
    page = Path(copy, "report.html").read_text()
    assert "export/0-int8.onnx" in page and "int8" in page


def test_other_formats_and_the_model_card_say_what_each_file_is(
    finished_run: FinishedRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    copy = str(shutil.copytree(finished_run.folder, tmp_path / "run"))
    arguments = ["export", copy, "--format", "pt2", "--format", "weights"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    onnx, program, weights = map(json.loads, result.stdout.splitlines())
    files = [each["file"] for each in (onnx, program, weights)]
    assert files == [f"{copy}/export/0.{suffix}" for suffix in ("onnx", "pt2", "pt")]
    assert program["top1_agreement"] == 1 and "val_top1" not in program
    assert program["classes"] == weights["classes"] and program["input"] == onnx["input"]
    assert nasray.load(files[2]).arch == weights["arch"]
    card = Path(copy, "export/0.md").read_text()
    for file in ("0.onnx", "0.pt2", "0.pt"):
        assert f"| `{file}` | fp32 |" in card
    assert copy not in card
    assert f"{onnx['val_top1']:.1%} of" in card and onnx["input"]["preprocessing"] in card
    written = [os.stat(file).st_mtime_ns for file in files]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert [os.stat(file).st_mtime_ns for file in files] == written

    assert [each["file"] for each in nasray.open(copy).exports()] == files
    rows = nasray.benchmark(copy)
    assert [(row["format"], row["ms"] > 0) for row in rows] == [("onnx", True), ("pt2", True)]
    recorded = storage.read_json(f"{copy}/job.json")
    recorded["job"]["export"]["pythons"] = {"pt2": f"{tmp_path}/gone"}
    storage.write_json(f"{copy}/job.json", recorded)
    rows = nasray.benchmark(copy)
    assert rows[1]["ms"] is None and "0.pt2 is not timed" in caplog.text
    for given, complaint in (
        (["--format", "tflite", "--python", "tflite"], "--python tflite: must be KEY=VALUE"),
        (["--format", "tflite", "--python", "tf=python3"], "pythons.tf"),
        (["--format", "tflite"], "No module named"),
        (["--format", "openvino", "--format", "pt2"], "No module named 'openvino'"),
    ):
        result = CliRunner().invoke(main, ["export", copy, *given])
        assert result.exit_code and complaint in result.stderr
    page = Path(nasray.open(copy).report()).read_text()
    assert "export/0.pt2" in page


def test_a_mistaken_data_set_may_be_corrected_before_anything_is_trained(
    make_job: MakeJob, small_data: str, tmp_path: Path
):
    with opened(str(tmp_path / "run"), make_job()) as run:
        run.dataset  # noqa: B018  opened to be recorded
    other = str(tmp_path / "other")
    config = DataConfig(source="synthetic", train_per_class=2, val_per_class=1, image_side=32)
    import_dataset(config, other, seed=0)
    with opened(str(tmp_path / "run"), make_job(data={"path": other})) as run:
        assert run.dataset.path == other


def test_a_run_that_lost_its_job_is_refused(
    finished_run: FinishedRun, make_job: MakeJob, tmp_path: Path
):
    copy = shutil.copytree(finished_run.folder, tmp_path / "run")
    (copy / "job.json").unlink()
    with pytest.raises(UserError, match="job.json is gone"), opened(str(copy), make_job()):
        pass


def test_a_retraining_waits_for_the_search_and_belongs_to_its_winner(
    finished_run: FinishedRun, tmp_path: Path
):
    copy = shutil.copytree(finished_run.folder, tmp_path / "run")
    storage.write_json(f"{copy}/retrain/0/genes.json", [0] * 6)
    with opened(str(copy)) as run, pytest.raises(UserError, match="holds another architecture"):
        retrain(run)
    (copy / "search.json").unlink()
    with opened(str(copy)) as run, pytest.raises(UserError, match="no finished search"):
        retrain(run)


def test_a_history_shorter_than_its_summary_is_refused(finished_run: FinishedRun, tmp_path: Path):
    copy = shutil.copytree(finished_run.folder, tmp_path / "run")
    max((copy / "history").glob("search-*")).unlink()
    for again in (search, retrain):  # which would take another winner
        with opened(str(copy)) as run, pytest.raises(UserError, match=r"remove search\.json"):
            again(run)
    storage.write_json(f"{copy}/search.json", {})
    with (
        opened(str(copy)) as run,
        pytest.raises(UserError, match="restore it, or remove it and run"),
    ):
        search(run)


def test_a_front_that_was_lost_is_written_again(finished_run: FinishedRun, tmp_path: Path):
    copy = shutil.copytree(finished_run.folder, tmp_path / "run")
    kept = {name: (copy / name).read_text() for name in ("front.json", "top.json")}
    for name in kept:
        (copy / name).unlink()
        with opened(str(copy)) as run:
            search(run)
        assert {name: (copy / name).read_text() for name in kept} == kept


def test_where_data_lie_and_how_many_evaluate_may_change(
    finished_run: FinishedRun, make_job: MakeJob, small_data: str, tmp_path: Path
):
    moved = shutil.copytree(small_data, tmp_path / "moved")
    job = make_job(data={"path": str(moved)}, compute={"num_evaluators": 5})
    with opened(finished_run.folder, job) as run:
        assert run.job == job
        assert run.data_path == str(moved)


def test_a_supernet_that_is_none_is_refused_in_one_line(finished_run: FinishedRun, tmp_path: Path):
    copy = shutil.copytree(finished_run.folder, tmp_path / "run")
    (copy / "supernet.pt").write_bytes(b"not weights")
    result = CliRunner().invoke(main, ["evaluate", str(copy), "largest"])
    assert (result.exit_code, result.stdout) == (1, "")
    [line] = result.stderr.splitlines()
    assert line.startswith(f"Error: {copy}/supernet.pt is not a readable checkpoint")


def test_all_evaluations_of_a_run_are_of_one_supernet(finished_run: FinishedRun, tmp_path: Path):
    copy = shutil.copytree(finished_run.folder, tmp_path / "run")
    with open(copy / "supernet.pt", "ab") as file:
        file.write(b"more")  # which torch does not mind
    unfinished = shutil.copytree(copy, tmp_path / "unfinished")
    (unfinished / "search.json").unlink()
    (unfinished / "history/_begun.json").unlink()
    with opened(str(unfinished)) as run, pytest.raises(UserError, match="tells of; restore it"):
        search(run)
    assert not (unfinished / "history/_begun.json").exists()
    with opened(str(copy)) as run:
        archs = [run.candidates[0].arch]
        for again in (
            lambda: search(run),
            lambda: evaluate(run, archs),
            lambda: sample(run, 10),
            lambda: calibration_study(run, 1),
        ):
            with pytest.raises(UserError, match=f"^{copy}/supernet.pt is not .* {copy}/history "):
                again()


def test_evaluate_measures_what_the_search_has_measured(finished_run: FinishedRun):
    top = storage.read_json(f"{finished_run.folder}/top.json")
    process = start_nasray("evaluate", finished_run.folder, *(json.dumps(e["arch"]) for e in top))
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    found = [json.loads(line) for line in stdout.splitlines()]
    assert [each["top1"] for each in found] == [entry["fitness"] for entry in top]
    assert [each["macs"] for each in found] == [entry["macs"] for entry in top]
    assert stderr == ""


def test_an_address_where_nothing_listens_is_refused(finished_run: FinishedRun):
    arguments = ["evaluate", finished_run.folder, "largest", "--address", "127.0.0.1:1"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "--address 127.0.0.1:1: no Ray cluster answers there" in result.stderr
    assert len(result.stderr.splitlines()) == 1

"""docs/ofa.md does what it says: its commands, programs and job run, in their order.

Weights made by a formula stand in for the published ones. The job is given ten classes, small
images and a small search; the rest is the page's own.
"""

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner

import nasray
from nasray import checkpoint
from nasray.cli.main import main
from nasray.data.synthetic import draw
from nasray.pretrained.ofa import ofa_tensors
from nasray.storage import files as storage
from tests.pretrained.published import FOLDER, formula_state, space_of

NET, FILE = "mbv3_w1.2", "ofa_mbv3_d234_e346_k357_w1.2"
PAGE = (Path(__file__).parents[2] / "docs/ofa.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.+?)^```", PAGE, re.M | re.S)
COMMANDS = [text for kind, text in BLOCKS if kind == "sh"]
PROGRAMS = [text for kind, text in BLOCKS if kind == "python"]
[JOB] = [text for kind, text in BLOCKS if kind == "toml"]
LIMITS = [60.0, 55.0, 50.0, 45.0, 40.0, 35.0, 30.0, 25.0, 20.0, 15.0]  # ms

PUBLISHED = FOLDER.parent  # of the predictor and the tables
CLASSES = 10
SMALLER = {160: 112, 224: 128}  # pixels: what the predictor knows, too
CHANGES = {
    'source = "imagefolder"\npath = "imagenet"': 'source = "synthetic"\nimage_side = 32',
    "holdout_per_class = 10": "holdout_per_class = 2\ntrain_per_class = 6\nval_per_class = 4",
    "resolutions = [160, 176, 192, 208, 224]": "resolutions = [112, 128]\nresolution = 128",
    "population_size = 100": "population_size = 12\nproposals = 2000\nnum_baseline = 1",
    "num_generations = 3": "num_generations = 2",
    "calibration_images = 2000": "calibration_images = 40",
}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    for name in ("acc_predictor.pth", "note10"):
        if not (PUBLISHED / name).exists():
            pytest.skip(f"{PUBLISHED / name} is absent")
    return formula_state(NET)


def run_command(text: str, *more: str) -> str:
    """Run a command of the page with `more` options; return what it prints."""
    words = shlex.split(text.replace("\\\n", " "))
    out = words.index(">") if ">" in words else len(words)
    assert words[0] == "nasray"
    result = CliRunner().invoke(main, [*words[1:out], *more])
    assert result.exit_code == 0, result.output
    for name in words[out + 1 :]:
        Path(name).write_text(result.stdout)
    return result.stdout


def table_rows() -> dict[str, list[float]]:
    """The rows of numbers of the page's table of the ten limits."""
    rows = re.findall(r"^\| (limit, ms|`\w+`)(?:, %)? \| ([\d. |]+) \|$", PAGE, re.M)
    return {name.strip("`"): [float(each) for each in row.split("|")] for name, row in rows}


def test_from_the_file_to_ten_limits_and_one_network_by_hand(
    state: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": state}, FILE)
    for name in ("acc_predictor.pth", "note10"):
        Path(name).symlink_to(PUBLISHED / name)
    Path("photos").mkdir()
    for number in range(4):
        Path(f"photos/{number}.jpg").write_bytes(draw("disc", 64, (number,)))
    import_weights, profile, front, _ = COMMANDS
    look, by_hand = PROGRAMS

    run_command(import_weights)
    lines = [json.loads(line) for line in run_command(profile).splitlines()]
    assert [f"{line['latency_ms']:.1f}" for line in lines] == ["92.4", "9.9"]
    assert all("predicted_accuracy" in line for line in lines)

    names: dict[str, Any] = {}
    exec(look, names)
    assert names["logits"].shape == (1, 1000)
    assert capsys.readouterr().out.startswith("{'ks': [")

    run_command(front, "--budget", "20000")
    answers = [json.loads(line) for line in Path("front.jsonl").read_text().splitlines()]
    assert [answer["limit"] for answer in answers] == LIMITS
    check_rising([answer["latency_ms"] for answer in answers])
    page = table_rows()
    assert page["limit, ms"] == LIMITS
    check_rising(page["latency_ms"])
    for answer, best in zip(answers, page["predicted_accuracy"], strict=True):
        # The page's are of a hundred times this budget.
        assert best - 1.5 < 100 * answer["predicted_accuracy"] < best + 0.1

    exec(by_hand, names := {})
    arch = nasray.DesignSpace(space_of(NET)).architecture(answers[-1]["arch"])
    check_file("15ms.onnx", space_of(NET).resolution_of(arch), 1000)
    assert capsys.readouterr().out == "4 1.0\n"


def check_rising(latencies: list[float]) -> None:
    """Check that the latencies, from the loosest limit on, keep the limits and fall with them."""
    assert all(ms <= limit for ms, limit in zip(latencies, LIMITS, strict=True))
    assert latencies == sorted(latencies, reverse=True)


def check_file(path: str, resolution: int, classes: int) -> dict[str, str]:
    """Run an ONNX file on two images; return what it says of itself."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = np.zeros((2, 3, resolution, resolution), np.float32)
    (logits,) = session.run(["logits"], {"images": images})
    assert logits.shape == (2, classes) and np.isfinite(logits).all()
    return session.get_modelmeta().custom_metadata_map


def small_table(old: int, new: int) -> str:
    """The published table of `old` pixels as one of `new` pixels and ten classes."""
    sides = {}
    text = (PUBLISHED / f"note10/{old}_lookup_table.yaml").read_text()
    while old not in sides:  # each layer that strides halves them
        sides[old] = new
        old, new = (old + 1) // 2, (new + 1) // 2
    sides[1] = 1
    text = re.sub(r"\b(\d+)x\1x", lambda found: f"{sides[int(found[1])]}x" * 2, text)
    return text.replace("-output:1000", f"-output:{CLASSES}")


@pytest.fixture(scope="module")
def run(
    state: dict[str, torch.Tensor], ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> nasray.RunDirectory:
    """What the page's job leaves, in a folder with files of those names."""
    folder = tmp_path_factory.mktemp("ofa")
    text = JOB
    for old, new in CHANGES.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.save({"state_dict": ten_classes(state)}, FILE)
        Path("acc_predictor.pth").symlink_to(PUBLISHED / "acc_predictor.pth")
        for old, new in SMALLER.items():
            storage.write(f"note10/{new}_lookup_table.yaml", small_table(old, new).encode())
        Path("ofa.toml").write_text(text)
        run_command(COMMANDS[-1])
    return nasray.open(folder / "runs/ofa")


def ten_classes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state with a classifier for the first ten classes only."""
    return {
        name: tensor[:CLASSES] if name.startswith("classifier") else tensor
        for name, tensor in state.items()
    }


def test_the_job_answers_all_limits(run: nasray.RunDirectory):
    answers = run.read("search.json")["answers"]
    assert [answer["limit"]["max"] for answer in answers] == LIMITS
    check_rising([answer["latency_ms"] for answer in answers])
    tops = [answer["fitness"] for answer in answers]
    assert tops == sorted(tops, reverse=True)  # a looser limit allows all that a tighter one does
    best = [
        max(found["fitness"] for found in run_evaluations(run) if found["latency_ms"] <= limit)
        for limit in LIMITS
    ]
    assert tops == best


def run_evaluations(run: nasray.RunDirectory) -> list[dict[str, Any]]:
    import pandas

    found = pandas.read_parquet(f"{run.folder}/history")
    return found[found.source == "search"].to_dict("records")


def test_every_answer_is_shipped_with_the_weights_of_the_file(
    run: nasray.RunDirectory, state: dict[str, torch.Tensor]
):
    genes = [tuple(answer["genes"]) for answer in run.read("search.json")["answers"]]
    results, checks = run.results(), run.exports()
    assert [tuple(result["genes"]) for result in results] == list(dict.fromkeys(genes))
    assert len(checks) == len(results)
    space = space_of(NET, num_classes=CLASSES)
    bias = ofa_tensors(space, ten_classes(state))["positions.22.0.output.bias"]
    for index, (result, check) in enumerate(zip(results, checks, strict=True)):
        assert result["shipped"] == "supernet" and 0 <= result["val_top1"] <= 1
        assert check["top1_agreement"] == 1.0 and check["num_images"] == 40
        assert check["file"] == f"{run.folder}/export/{index}.onnx"
        said = check_file(check["file"], result["arch"]["r"], CLASSES)
        assert said["arch"] == json.dumps(result["arch"])
        _, _, subnet, _ = checkpoint.load_subnet(f"{run.folder}/retrain/{index}/model.pt")
        assert torch.equal(subnet.head.output.bias, bias)


def test_the_run_is_whole(run: nasray.RunDirectory):
    assert {stage.state for stage in run.status()} == {"done"}
    assert "latency_ms" in Path(run.folder, "report.html").read_text()


def test_the_job_of_the_page_is_one_for_the_published_file():
    """As it stands: of the options that the file, the predictor and the table are for."""
    values = tomllib.loads(JOB)
    job = nasray.open("nowhere", values).job
    assert job is not None and job.retrain.num_winners == job.retrain.epochs == 0
    assert [limit.max for limit in job.search.limits] == LIMITS
    assert values["space"].items() >= {"name": "ofa_mobilenetv3", "width": 1.2}.items()
    assert values["supernet"] == {"init": FILE, "epochs": 0}

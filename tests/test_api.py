"""The Python API: what each name does, and that docs/api.md tells it.

    python -m tests.test_api > docs/api.md

writes the page again from the docstrings.
"""

import inspect
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import nasray
from nasray import checkpoint
from nasray.config import Job
from nasray.data.transforms import MEAN, STD
from nasray.errors import InfeasibleError, UserError
from nasray.spaces.tiny import Tiny
from nasray.storage import files as storage
from tests.conftest import MakeJob

DOCS = Path(__file__).parents[1] / "docs"
INTRODUCTION = """# The Python API

Written by `python -m tests.test_api > docs/api.md` from the docstrings.
[quickstart.ipynb](quickstart.ipynb) uses most of it. `import nasray` loads each name when it is
first used. Mistakes of the caller are `nasray.errors.UserError`, a `ValueError`.
"""
MODULES = r"collections\.abc\.|typing\.|nasray\.config\.|['\"]"  # left out of signatures


def page() -> str:
    """The text of docs/api.md."""
    parts = [INTRODUCTION]
    functions = ("run", "open", "load", "load_supernet", "space", "check_data", "import_data")
    functions += ("predict", "benchmark")
    for name in (*functions, "RunDirectory", "DesignSpace"):
        found = getattr(nasray, name)
        parts.append(_described(f"## nasray.{name}", found))
        if inspect.isclass(found):
            methods = [each for each in vars(found).items() if _is_public_method(*each)]
            parts += [_described(f"### {name}.{method}", value) for method, value in methods]
    return "\n".join(parts)


def _is_public_method(name: str, value: Any) -> bool:
    return inspect.isfunction(value) and not name.startswith("_")


def _described(title: str, found: Any) -> str:
    signature = re.sub(MODULES, "", str(inspect.signature(found)))
    return f"{title}\n\n```text\n{title.split()[1]}{signature}\n\n{inspect.getdoc(found)}\n```\n"


def test_docs_tell_every_name_with_its_signature():
    assert (DOCS / "api.md").read_text() == page()
    for name in nasray.__all__:
        assert f"## nasray.{name}\n" in page()


def test_names_are_found_when_they_are_asked_for():
    assert set(nasray.__all__) <= set(dir(nasray))
    with pytest.raises(AttributeError, match="module 'nasray' has no attribute 'serach'"):
        nasray.serach  # noqa: B018


def test_a_space_scores_networks_by_the_rules_of_micronet():
    space = nasray.space("shufflenet")
    _, _, int8 = space.micronet("oneshot-s+")
    assert int8.score == pytest.approx(0.4615, abs=5e-5)
    convolutions = space.micronet("oneshot-s+", int8={"Conv2d"})
    by_function = space.micronet("oneshot-s+", int8=lambda op: op.kind == "Conv2d")
    assert convolutions == by_function
    assert convolutions[2].score > int8.score
    assert space.micronet("oneshot-s+", strict=True)[0].score == pytest.approx(1.0379, abs=5e-5)


def test_a_run_without_networks_has_no_micronet_scores(tmp_path: Path):
    run = nasray.RunDirectory(str(tmp_path))
    with pytest.raises(UserError, match="has no retrained model; run `nasray retrain` first"):
        run.micronet()


def test_a_space_counts_costs_as_the_command_line_does():
    space = nasray.space("shufflenet")
    assert space.costs("oneshot-s+")["macs"] == 291475944
    smallest = {"block": [0] * 20, "channel": [2] * 20}
    arch = space.architecture(smallest)
    assert space.describe(arch) == space.describe(json.dumps(smallest)) == smallest
    assert space.costs(arch)["macs"] == 168064936
    with pytest.raises(UserError, match="is unknown"):
        nasray.space("shufflnet")
    with pytest.raises(UserError, match="40 genes, got 1"):
        space.costs([0])


def test_samples_are_within_limits_and_follow_the_seed():
    space = nasray.space("tiny", resolution=32)
    limits = [{"cost": "macs", "max": 1.2e6}]
    drawn = space.sample(5, limits=limits)
    assert len(set(drawn)) == 5 and drawn == space.sample(5, limits=limits)
    assert drawn != space.sample(5, limits=limits, seed=1)
    assert all(space.costs(arch)["macs"] <= 1.2e6 for arch in drawn)
    with pytest.raises(InfeasibleError):
        space.sample(1, limits=[{"cost": "macs", "max": 1}])
    with pytest.raises(UserError, match="limits: unknown key 'search.limits.0.most'"):
        space.sample(1, limits=[{"cost": "macs", "most": 1}])


def test_an_extracted_network_computes_what_the_supernet_does():
    space = nasray.space("tiny", num_classes=5, resolution=32)
    supernet, arch = space.supernet(seed=3).eval(), space.sample(1)[0]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = space.extract(supernet, arch).eval()(images)
        assert found.shape == (2, 5)
        torch.testing.assert_close(found, supernet(images, arch))
        again = space.supernet(seed=3).eval()(images, arch)
    torch.testing.assert_close(found, again)


def test_a_retrained_network_is_loaded_with_its_normalisation(tmp_path: Path):
    tiny = Tiny(num_classes=4, resolution=32)
    space = nasray.DesignSpace(tiny)
    subnet = space.extract(space.supernet(), "largest").eval()
    path = f"{tmp_path}/model.pt"
    arch = space.architecture("largest")
    checkpoint.save_subnet(path, tiny, arch, subnet, classes=["a", "b", "c", "d"])
    model = nasray.load(path)
    assert not model.training
    assert (model.classes, model.resolution) == (["a", "b", "c", "d"], 32)
    assert model.arch == tiny.to_json(arch)
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        torch.testing.assert_close(model(images), subnet((255 * images - mean) / std))


@pytest.fixture
def retrained(tmp_path: Path) -> str:
    """The path of a network of four classes, as retraining leaves it."""
    tiny = Tiny(num_classes=4, resolution=32)
    space = nasray.DesignSpace(tiny)
    subnet = space.extract(space.supernet(), "largest")
    path, arch = f"{tmp_path}/model.pt", space.architecture("largest")
    checkpoint.save_subnet(path, tiny, arch, subnet, classes=["a", "b", "c", "d"])
    return path


def test_a_retrained_network_is_loaded_as_a_backbone(retrained: str):
    whole: Any = nasray.load(retrained)
    images = torch.rand(2, 3, 64, 96)
    backbone: Any = nasray.load(retrained, features_only=True)
    assert not backbone.training
    assert (backbone.classes, backbone.resolution, backbone.arch) == ([], 32, whole.arch)
    with torch.no_grad():
        found = backbone(images)
        torch.testing.assert_close(whole.network.head(found[-1]), whole(images))
    assert [tuple(each.shape) for each in found] == [
        (2, 8, 32, 48),
        (2, 16, 16, 24),
        (2, 32, 8, 12),
    ]
    assert backbone.feature_info.reduction() == [2, 4, 8]
    assert backbone.feature_info.module_name() == ["block0", "block1", "block2"]
    some: Any = nasray.load(retrained, features_only=True, out_indices=(0, 1))
    assert some.feature_info.channels() == [8, 16]
    with torch.no_grad():
        assert all(map(torch.equal, some(images), found[:2]))


def test_a_retrained_network_gets_a_new_classifier_and_keeps_the_rest(retrained: str):
    whole: Any = nasray.load(retrained)
    model: Any = nasray.load(retrained, num_classes=7, seed=1)
    assert not model.training and (model.classes, model.arch) == ([], whole.arch)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    old, new = whole.state_dict(), model.state_dict()
    assert old.keys() == new.keys()
    different = {name for name in old if not old[name].equal(new[name])}
    assert different == {"network.head.output.weight", "network.head.output.bias"}
    drawn = "network.head.output.weight"
    again = nasray.load(retrained, num_classes=7, seed=1).state_dict()
    assert again[drawn].equal(new[drawn])
    assert not nasray.load(retrained, num_classes=7).state_dict()[drawn].equal(new[drawn])
    # As many classes as before are other ones all the same.
    replaced: Any = nasray.load(retrained, num_classes=4)
    assert replaced.classes == [] and not replaced.state_dict()[drawn].equal(old[drawn])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"features_only": True, "num_classes": 3}, "num_classes = 3: feature maps have no class"),
        ({"out_indices": (1,)}, "out_indices = (1,) needs features_only=True"),
        ({"features_only": True, "out_indices": (3,)}, "out_indices = (3,) must be a list of"),
        ({"num_classes": 0}, "num_classes = 0 must be 1 or more"),
        ({"num_classes": 2, "seed": -1}, "seed = -1 0 or more"),
    ],
)
def test_options_of_a_loaded_network_that_make_no_sense_are_refused(
    retrained: str, options: dict[str, Any], complaint: str
):
    with pytest.raises(UserError, match=re.escape(complaint)) as refused:
        nasray.load(retrained, **options)
    assert "\n" not in str(refused.value)


def test_a_supernet_is_loaded_to_run_and_to_extract_from(tmp_path: Path):
    space = nasray.space("tiny", num_classes=5, resolution=32)
    checkpoint.save_supernet(f"{tmp_path}/supernet.pt", space.supernet(seed=3))
    supernet = nasray.load_supernet(tmp_path / "supernet.pt")
    assert supernet.space == space.space and not supernet.training
    arch = supernet.space.from_json(space.describe("largest"))
    assert arch == nasray.DesignSpace(supernet.space).architecture("largest")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = supernet(images, arch)
        torch.testing.assert_close(supernet.extract(arch)(images), logits)
        torch.testing.assert_close(space.supernet(seed=3).eval()(images, arch), logits)
    with pytest.raises(UserError, match="nothing.pt does not exist"):
        nasray.load_supernet(tmp_path / "nothing.pt")


def test_what_is_no_network_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        nasray.load(f"{tmp_path}/model.pt")
    checkpoint.save_supernet(f"{tmp_path}/supernet.pt", nasray.space("tiny").supernet())
    with pytest.raises(UserError, match="holds a supernet, not one subnet"):
        nasray.load(f"{tmp_path}/supernet.pt")


def test_a_folder_without_a_job_is_no_run(tmp_path: Path):
    with pytest.raises(UserError, match="is not a run directory: it has no job.json"):
        nasray.open(str(tmp_path))


def test_a_job_may_be_a_file_its_content_or_checked(tmp_path: Path):
    content = {"data": {"source": "tar", "path": "/pictures.tar"}, "space": {"name": "tiny"}}
    text = '[data]\nsource = "tar"\npath = "/pictures.tar"\n[space]\nname = "tiny"\n'
    (tmp_path / "job.toml").write_text(text)
    job = Job.model_validate(content)
    for given in (f"{tmp_path}/job.toml", content, job):
        assert nasray.open(f"{tmp_path}/run", given).job == job
        moved = nasray.open(f"{tmp_path}/run", given, data_path="/other.tar").job
        assert moved is not None and moved.data.path == "/other.tar"
    with pytest.raises(UserError, match="^job: unknown key 'serach'"):
        nasray.open(f"{tmp_path}/run", content | {"serach": {}})
    with pytest.raises(UserError, match="^job: space.name = 'tinny' is unknown"):
        nasray.open(f"{tmp_path}/run", content | {"space": {"name": "tinny"}})
    assert not (tmp_path / "run").exists()


def test_paths_of_a_job_do_not_depend_on_the_form_it_is_given_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    text = """
        data = { source = "tar", path = "pictures.tar" }
        search = { latency_table = "table.csv", predictor = "s3://bucket/predictor.pt" }
    """
    Path("job.toml").write_text(text)
    content = tomllib.loads(text)
    given: tuple[Any, ...] = ("job.toml", content, Job.model_validate(content))
    for found in (nasray.open("run", form).job for form in given):
        assert found is not None
        assert found.data.path == str(tmp_path / "pictures.tar")
        assert found.search.latency_table == str(tmp_path / "table.csv")
        assert found.search.predictor == "s3://bucket/predictor.pt"
    assert content == tomllib.loads(text)  # the caller's own dict stays as it was


@pytest.mark.parametrize("source", ["parquet", "cifar"])
def test_what_is_no_source_cannot_be_imported(tmp_path: Path, source: str):
    complaint = {
        "parquet": "data.source = 'parquet' stands for a data set that is imported already",
        "cifar": "data.source = 'cifar' is unknown; did you mean 'cifar10'? there are",
    }
    with pytest.raises(UserError, match=re.escape(complaint[source])):
        nasray.import_data(source, f"{tmp_path}/out", path=str(tmp_path))
    assert not (tmp_path / "out").exists()


def test_a_handle_reads_what_is_there(tmp_path: Path):
    run = nasray.RunDirectory(str(tmp_path))
    with pytest.raises(UserError, match="front.json is not there yet"):
        run.front()
    storage.write_json(f"{tmp_path}/front.json", [{"macs": 1.0}])
    for name in ("10", "9"):
        storage.write_json(f"{tmp_path}/retrain/{name}/result.json", {"name": name})
        storage.write_json(f"{tmp_path}/export/{name}.json", {"file": f"export/{name}.onnx"})
    storage.write(f"{tmp_path}/export/9.onnx", b"")
    storage.make_folder(f"{tmp_path}/retrain/11")
    assert run.front() == [{"macs": 1.0}]
    assert [result["name"] for result in run.results()] == ["9", "10"]
    files = [f"{tmp_path}/export/{name}.onnx" for name in (9, 10)]
    assert [check["file"] for check in run.exports()] == files


def test_a_run_that_was_moved_names_its_files_where_they_are_now(tmp_path: Path):
    storage.write_json(f"{tmp_path}/first/export/0.json", {"file": f"{tmp_path}/first/0.onnx"})
    (tmp_path / "first").rename(tmp_path / "second")
    [check] = nasray.RunDirectory(f"{tmp_path}/second").exports()
    assert check["file"] == f"{tmp_path}/second/export/0.onnx"


@pytest.mark.ray
def test_one_handle_trains_searches_by_a_predictor_and_retrains(
    ray_cluster: None, make_job: MakeJob, tmp_path: Path
):
    """The job says nothing of `verify`, so what search(verify=True) recorded holds from there."""
    retrain = {"num_trials": 1, "epochs": 2}
    handle = nasray.open(f"{tmp_path}/run", make_job(search={"proposals": 1000}, retrain=retrain))
    handle.train()
    answers = handle.search(verify=True)
    [result] = handle.retrain()
    assert result["genes"] == answers[0]["genes"]
    [found] = handle.evaluate([answers[0]["arch"]])
    assert found["top1"] == answers[0]["fitness"]
    assert handle.train() == f"{tmp_path}/run/supernet.pt"
    assert handle.search() == answers
    with pytest.raises(UserError, match="search.verify = True, the job says False"):
        handle.search(verify=False)
    assert handle.read("job.json")["job"]["search"]["verify"] is True


@pytest.mark.ray
def test_the_notebook_runs(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its cells run in order, as Jupyter would run them, and every stage of a run is done."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((DOCS / "quickstart.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert {stage.state for stage in names["run"].status()} == {"done"}
    assert names["logits"].shape == (1, 10)


if __name__ == "__main__":
    print(page(), end="")


def test_paths_may_be_path_objects(tmp_path):
    job = tmp_path / "job.toml"
    job.write_text('[space]\nname = "tiny"\nresolution = 32\n[data]\nsource = "synthetic"\n')
    handle = nasray.open(tmp_path / "run", job, data_path=tmp_path / "data")
    assert handle.folder == str(tmp_path / "run") and handle.data_path == str(tmp_path / "data")
    with pytest.raises(UserError, match="model.pt"):
        nasray.load(tmp_path / "model.pt")


def test_what_is_no_list_no_number_and_no_file_is_refused(tmp_path):
    job = {"space": {"name": "tiny", "resolution": 32}, "data": {"source": "synthetic"}}
    handle = nasray.open(tmp_path / "run", job)
    assert handle.evaluate([]) == []
    for call, words in {
        lambda: handle.evaluate("smallest"): "takes a list of architectures: ['smallest']",
        lambda: handle.calibration_study(2): "num_archs = 2 must be 3 or more",
        lambda: handle.fit_predictor(-1): "sample = -1 must be 0 or more",
        lambda: nasray.space("tiny").sample(0): "number = 0 must be 1 or more",
        lambda: nasray.open(tmp_path / "run", "seed = 0\n[data]\n"): "give the path of its file",
    }.items():
        with pytest.raises(UserError) as refused:
            call()
        assert words in str(refused.value) and "\n" not in str(refused.value)

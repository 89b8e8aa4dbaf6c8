"""What training begins with: files that the job names, read once and kept in the run."""

import re
from pathlib import Path

import pytest
import torch
import torchvision

from nasray import checkpoint
from nasray.data.shards import open_dataset
from nasray.errors import UserError
from nasray.pipeline.run import opened
from nasray.pipeline.start import prepare_start
from nasray.spaces import space_by_name
from nasray.spaces.space import largest
from nasray.spaces.supernet import build_subnet
from nasray.spaces.tiny import Tiny
from nasray.storage import files as storage
from tests.conftest import MakeJob, assert_same_weights


def save_supernet(path: Path, *, num_classes: int = 4, seed: int = 1, **extra: object) -> str:
    space = Tiny(num_classes=num_classes, resolution=32)
    supernet = space.supernet()
    space.initialize(supernet, torch.Generator().manual_seed(seed))
    checkpoint.save_supernet(str(path), supernet, **extra)
    return str(path)


def begin(run_dir: Path, make_job: MakeJob, **supernet: object) -> None:
    """Prepare a run's start as `nasray train` does."""
    with opened(str(run_dir), make_job(supernet=supernet)) as run:
        prepare_start(run)


def test_weights_are_kept_in_the_run_and_a_changed_file_is_noticed(
    make_job: MakeJob, tmp_path: Path
):
    file, run = save_supernet(tmp_path / "a.pt"), tmp_path / "run"
    begin(run, make_job, init=file)
    assert_same_weights(file, run / "init/supernet.pt")
    assert storage.read_json(f"{run}/init/digests.json") == {"init": checkpoint.digest(file)}
    (tmp_path / "a.pt").rename(tmp_path / "b.pt")
    begin(run, make_job, init=file)  # it is needed no more
    save_supernet(tmp_path / "a.pt", seed=2)
    with pytest.raises(UserError, match=r"^supernet\.init = .*/a\.pt: not the file that this run"):
        begin(run, make_job, init=file)
    (run / "supernet.pt").touch()  # training has ended
    begin(run, make_job, init=file)


def test_a_head_for_other_classes_is_drawn_from_the_seed(make_job: MakeJob, tmp_path: Path):
    file = save_supernet(tmp_path / "a.pt", num_classes=7)
    heads, others = [], []
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        job = make_job(seed=seed, supernet={"init": file})
        with opened(str(tmp_path / name), job) as run:
            prepare_start(run)
        state = torch.load(tmp_path / name / "init/supernet.pt", weights_only=True)["state"]
        heads.append(state.pop("positions.3.0.output.weight"))
        state.pop("positions.3.0.output.bias")
        others.append(state)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    known = torch.load(file, weights_only=True)["state"]
    assert heads[0].shape == (4, 32)
    for state in others:
        assert all(torch.equal(known[name], tensor) for name, tensor in state.items())


def test_no_epochs_take_the_supernet_as_it_is(make_job: MakeJob, small_data: str, tmp_path: Path):
    classes = list(open_dataset(small_data).classes)
    for name, extra in (("unnamed", {}), ("named", {"classes": classes})):
        file = save_supernet(tmp_path / f"{name}.pt", **extra)
        begin(tmp_path / name, make_job, init=file, epochs=0)
        assert_same_weights(file, tmp_path / name / "supernet.pt")
        assert not (tmp_path / name / "init/supernet.pt").exists()


@pytest.mark.parametrize("other", [{"num_classes": 7}, {"classes": ["1", "2", "3", "4"]}])
def test_no_epochs_for_other_classes_are_refused(make_job: MakeJob, tmp_path: Path, other: dict):
    file = save_supernet(tmp_path / "a.pt", **other)
    with pytest.raises(UserError, match="knows other classes than the data set.*set it to 1"):
        begin(tmp_path / "run", make_job, init=file, epochs=0)
    assert not (tmp_path / "run/supernet.pt").exists()
    begin(tmp_path / "run", make_job, init=file, epochs=1)  # the fix works


@pytest.mark.parametrize(
    ("key", "trained", "wanted", "more"),
    [
        ("resolutions", [32, 64], [32, 48, 64], "48"),
        ("expand_shares", [0.5, 1.0], [0.25, 1.0], "0.25"),
    ],
)
def test_no_epochs_with_choices_that_were_not_trained_are_refused(
    make_job: MakeJob, tmp_path: Path, key: str, trained: list, wanted: list, more: str
):
    options = {"base": "mobilenet_v3_small", "resolution": 64, "resolutions": [64]}
    space = space_by_name("mbconv", num_classes=4, **options | {key: trained})
    file = str(tmp_path / "a.pt")
    checkpoint.save_supernet(file, space.supernet())
    section = {"name": "mbconv", **options | {key: wanted}}
    said = rf"not trained with {more} of space\.{key} = .*leave {more} out, or set epochs to 1"
    job = make_job(space=section, supernet={"init": file, "epochs": 0})
    with opened(str(tmp_path / "run"), job) as run, pytest.raises(UserError, match=said):
        prepare_start(run)
    section[key] = [each for each in wanted if each in trained]  # the fix
    job = make_job(space=section, supernet={"init": file, "epochs": 0})
    with opened(str(tmp_path / "run"), job) as run:
        prepare_start(run)


def test_no_epochs_over_one_trained_network_are_warned_of(
    make_job: MakeJob, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file = str(tmp_path / "a.pth")
    torch.save(torchvision.models.mobilenet_v3_small(num_classes=4).state_dict(), file)
    section = {"name": "mbconv", "base": "mobilenet_v3_small", "resolution": 64}
    job = make_job(space=section | {"resolutions": [64]}, supernet={"init": file, "epochs": 0})
    with opened(str(tmp_path / "run"), job) as run:
        prepare_start(run)
    assert "is one trained network, whose smaller subnets were never trained" in caplog.text


def test_a_file_of_another_digest_or_none_is_refused(make_job: MakeJob, tmp_path: Path):
    file = save_supernet(tmp_path / "a.pt")
    for changes, said in (
        ({"init": file, "init_sha256": "0" * 64}, "has the SHA-256"),
        ({"init": f"{file}x"}, "does not exist"),
        ({"teacher": f"{file}x", "distillation": 0.5}, "does not exist"),
    ):
        with pytest.raises(UserError, match=said):
            begin(tmp_path / "run", make_job, **changes)


def test_what_is_prepared_follows_the_job_until_training_begins(make_job: MakeJob, tmp_path: Path):
    one, other = (save_supernet(tmp_path / f"{seed}.pt", seed=seed) for seed in (1, 2))
    for file in (one, other):
        begin(tmp_path / "run", make_job, init=file)
        assert_same_weights(file, tmp_path / "run/init/supernet.pt")


def test_a_teacher_is_copied_if_it_knows_the_classes(make_job: MakeJob, tmp_path: Path):
    space = Tiny(num_classes=4, resolution=32)
    subnet = build_subnet(space.decode(largest(space)))
    files = [save_supernet(tmp_path / "supernet.pt"), str(tmp_path / "model.pt")]
    checkpoint.save_subnet(files[1], space, largest(space), subnet)
    for index, file in enumerate(files):
        begin(tmp_path / f"{index}", make_job, teacher=file, distillation=0.5)
        assert (tmp_path / f"{index}/init/teacher.pt").read_bytes() == Path(file).read_bytes()
    strange = save_supernet(tmp_path / "7.pt", num_classes=7)
    said = re.escape(f"{strange} knows 7 classes, but not those 4 of the data set")
    with pytest.raises(UserError, match=said):
        begin(tmp_path / "run", make_job, teacher=strange, distillation=0.5)


def test_the_head_of_as_many_other_classes_is_drawn_too(make_job: MakeJob, tmp_path: Path):
    file = save_supernet(tmp_path / "a.pt", classes=["1", "2", "3", "4"])
    begin(tmp_path / "run", make_job, init=file)
    known, kept = (
        torch.load(path, weights_only=True)["state"]
        for path in (file, tmp_path / "run/init/supernet.pt")
    )
    new = {name for name, tensor in kept.items() if not torch.equal(known[name], tensor)}
    assert "positions.3.0.output.weight" in new
    assert all("output" in name for name in new)


def test_a_job_may_change_until_its_teacher_is_trained(make_job: MakeJob, tmp_path: Path):
    file, run = save_supernet(tmp_path / "a.pt"), tmp_path / "run"
    for epochs in (6, 7):
        begin(run, make_job, init=file, teacher_epochs=epochs)
    (run / "teacher").mkdir()
    with pytest.raises(UserError, match=r"recorded with supernet\.teacher_epochs = 7"):
        begin(run, make_job, init=file, teacher_epochs=6)


def test_limits_may_not_change_while_a_supernet_is_trained_within_them(
    make_job: MakeJob, tmp_path: Path
):
    run = tmp_path / "run"

    def begin_within(most: float) -> None:
        limits = [{"cost": "macs", "max": most}]
        job = make_job(supernet={"sampling": "banded"}, search={"limits": limits})
        with opened(str(run), job):
            pass

    for most in (1e6, 2e6):
        begin_within(most)
    (run / "train").mkdir()
    with pytest.raises(UserError, match=r"recorded with search\.limits = "):
        begin_within(1e6)
    (run / "supernet.pt").touch()
    begin_within(1e6)


def test_the_files_of_a_run_may_have_moved_and_others_are_refused(
    make_job: MakeJob, tmp_path: Path
):
    """`nasray submit` unpacks the same file in another folder each time."""
    file, run = save_supernet(tmp_path / "a.pt"), tmp_path / "run"
    begin(run, make_job, init=file)
    (run / "train").mkdir()
    (tmp_path / "a.pt").rename(tmp_path / "b.pt")
    begin(run, make_job, init=str(tmp_path / "b.pt"))
    other = save_supernet(tmp_path / "c.pt", seed=2)
    for changed in (other, str(tmp_path / "gone.pt"), "https://host/b.pt"):
        with pytest.raises(UserError, match=r"was recorded with supernet\.init = '.*b\.pt'"):
            begin(run, make_job, init=changed)


def test_a_file_that_is_not_there_is_told_before_the_import(make_job: MakeJob, tmp_path: Path):
    for key, value in (("init", str(tmp_path / "a.pt")), ("teacher", str(tmp_path / "b.pt"))):
        job = make_job(supernet={key: value, "distillation": 0.5, "sampling": "sandwich"})
        with pytest.raises(UserError, match=rf"supernet\.{key} = .*\.pt does not exist; "):
            with opened(str(tmp_path / key), job):
                pytest.fail("the run was opened")
        assert not (tmp_path / key / "job.json").exists()

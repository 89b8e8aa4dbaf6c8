"""A job file is read whole, and a mistake in it is one line that says what to mend."""

import json
import os
import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from nasray.algorithms import ALGORITHMS
from nasray.config import (
    FROM_INIT,
    FROM_SUPERNET,
    Job,
    RetrainConfig,
    SearchConfig,
    SupernetConfig,
    load_job,
    parse_job,
)
from nasray.errors import UserError
from nasray.pipeline.run import check_names

JOBS = sorted(Path(__file__).parents[1].glob("jobs/**/*.toml"))
MINIMAL = {"data": {"source": "synthetic"}}


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_every_job_loads_and_names_a_space_and_costs_that_exist(path):
    check_names(load_job(str(path)), str(path))
    assert path.read_text().startswith("# "), "a job begins with what it does and costs"


def test_there_are_jobs():
    assert {path.name for path in JOBS} >= {
        "demo.toml",
        "signdigits.toml",
        "oneshot_imagenet.toml",
    }


def test_docs_tell_every_key_and_its_default():
    text = (Path(__file__).parents[1] / "docs/job.md").read_text()
    head, *sections = re.split(r"^## \[(\w+)\]$", text, flags=re.M)
    told = {"": head, **dict(zip(sections[::2], sections[1::2], strict=True))}
    models = {
        name: field.annotation
        for name, field in Job.model_fields.items()
        if issubclass(field.annotation, BaseModel)
    }
    assert told.keys() == {"", *models}
    for name, model in {"": Job, **models}.items():
        rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", told[name], flags=re.M)
        found = {
            key: ... if default == "needed" else tomllib.loads(f"x = {default.strip('`')}")["x"]
            for key, default in rows
        }
        known = {
            key: ... if field.is_required() else json.loads(json.dumps(field.default))
            for key, field in model.model_fields.items()
            if key not in models
        }
        assert list(found.items()) == list(known.items())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"dat": {}}, "unknown key 'dat'; did you mean 'data'? a job has compute, data, "),
        (
            {"data": {"source": "synthetic", "pth": "x"}},
            "'data.pth'; did you mean 'path'?",
        ),
        ({"compute": {"device": "gpus"}}, "'gpus'; did you mean 'gpu'?"),
        ({"data": {"source": "synthetic", "background": "witte"}}, "'witte' is no opaque colour"),
        ({"data": {"source": "synthetic", "background": "#ffffff80"}}, "is no opaque colour; give"),
        (
            {"search": {"algorithm": "genetics", "racing": True}},
            "got algorithm = 'genetics': only they have parents",
        ),
        (
            {"search": {"racing": True, "fitness": "balanced"}},
            "fitness = \"top1\" alone, got fitness = 'balanced'; set one of the two back",
        ),
        ({"search": {"population_size": 1}}, "search.population_size: input should be greater"),
        ({"search": {"num_parents": 50}}, "num_parents must be below population_size = 50"),
        ({"search": {"limits": [{"cost": "macs"}]}}, "a limit needs `max`, `min` or both"),
        ({"search": {"limits": [{"cost": "macs", "mx": 3}]}}, "unknown key 'search.limits.0.mx'"),
        ({"search": {"limits": [{"cost": "macs", "max": 1, "min": 2}]}}, "min 2 is above max 1"),
        (
            {
                "search": {
                    "algorithm": "front",
                    "limits": [{"cost": "macs", "max": 3}, {"cost": "macs", "max": 6, "min": 4}],
                }
            },
            "limits on macs, the first limit's cost, are answered one by one",
        ),
        (
            {
                "search": {
                    "algorithm": "top-down",
                    "num_generations": 1,
                    "limits": [{"cost": "macs", "max": 3}, {"cost": "macs", "max": 6}],
                }
            },
            "num_generations = 1 must be at least 2",
        ),
        ({"retrain": {"learning_rate": [2, 1]}}, "learning_rate"),
        ({"retrain": {"learning_rate": 0}}, "learning_rate"),
        ({"space": {"resolution": 20}}, "space.resolution: input should be greater"),
        ({"search": {"limits": [{"cost": "macs", "max": float("nan")}]}}, "finite number"),
        ({"supernet": {"epochs": 30}}, "channel_warmup_start = 60 must be at least"),
        ({"supernet": {"shared_start_epochs": 61}}, "shared_start_epochs = 61"),
        ({"supernet": {"epochs": 0}}, "epochs = 0 takes a supernet as it is: name its file"),
        (
            {"supernet": {"init": "a.pt", "epochs": 0, "teacher_epochs": 2}},
            "teacher_epochs = 2 trains a teacher for the supernet, which epochs = 0 takes",
        ),
        (
            {"supernet": {"init": "a.pt", "shared_start_epochs": 2, "channel_warmup_start": 2}},
            "shared_start_epochs = 2 would copy the first operation of each block over",
        ),
        ({"retrain": {"init": "supernet", "num_trials": 3}}, "num_trials = 3 is for training, and"),
        (
            {"retrain": {"init": "supernet", "learning_rate": [0.1, 1.0]}},
            "learning_rate = (0.1, 1.0) is for training, and epochs = 0 trains nothing: set",
        ),
        ({"supernet": {"init_sha256": "ab"}}, "init_sha256 is of the file `init`, which is not"),
        ({"supernet": {"distillation": 0.5}}, "distillation = 0.5 needs soft labels: set sampling"),
        (
            {"supernet": {"sampling": "progressive", "channel_warmup_epochs": 0}},
            "opens smaller choices step by step, and channel_warmup_epochs = 0 opens all at once",
        ),
        (
            {"supernet": {"rank_loss": 2}},
            'rank_loss = 2.0 compares the subnets of a step, and sampling = "uniform" has one',
        ),
        (
            {"supernet": {"rank_loss": 2, "sampling": "sandwich", "distillation": 1}},
            "distillation = 1.0 with its largest, to teach the others; name a `teacher`, or",
        ),
        (
            {"supernet": {"distillation_loss": "alpha"}},
            'distillation_loss = "alpha" is of soft labels, and there are none with',
        ),
        (
            {"supernet": {"sampling": "banded"}},
            '"banded" draws within search.limits, and there',
        ),
        (
            {"supernet": {"sampling": "sandwich", "sandwich_within_limits": True}},
            "sandwich_within_limits = true draws within search.limits, and there are none; add",
        ),
        (
            {"supernet": {"sandwich_within_limits": True}},
            'sampling = "uniform" with sandwich_random = 2 has none; set sampling to "sandwich"',
        ),
        ({"supernet": {"sampling": "fair", "distillation": 1}}, "distillation = 1.0 needs soft"),
        ({"supernet": {"sampling": "fiar"}}, "'fiar'; did you mean 'fair'"),
        ({"supernet": {"teacher_epochs": 2}}, "teaches nothing with distillation = 0; set it"),
        (
            {"supernet": {"teacher": "a.pt", "teacher_epochs": 2, "distillation": 1}},
            "teacher_epochs = 2 trains a teacher, but `teacher` names one; give one",
        ),
        ({"supernet": {"teacher": "model.pt"}}, "teaches nothing with distillation = 0; set it"),
        ({"retrain": {"epochs": 0}}, "epochs = 0 ships the supernet's weights: set init to"),
        ({"retrain": {"also": [{}]}}, "two ways are 'scratch', by their init and epochs"),
        ({"retrain": {"also": [{"epoch": 1}]}}, "'retrain.also.0.epoch'; did you mean 'epochs'?"),
        (
            {"retrain": {"also": [{"init": "supernet", "also": [{}]}]}},
            "`also` within `also`; list all",
        ),
        ({"retrain": {"label_smoothing": 1.5}}, "label_smoothing = 1.5 must be below 1"),
        ({"seed": "x"}, "seed: input should be a valid integer"),
    ],
)
def test_a_mistake_is_one_line_with_file_key_and_fix(changes, complaint):
    with pytest.raises(UserError, match=re.escape(complaint)) as raised:
        parse_job(MINIMAL | changes, "job.toml")
    assert str(raised.value).startswith("job.toml: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("algorithm", "complaint"),
    [
        ("genetics", "is unknown; did you mean 'genetic'? there are genetic, random, front, "),
        ("xyz", "is unknown; there are genetic, random, front, "),
    ],
)
def test_an_unknown_algorithm_is_one_line_with_the_nearest_name(algorithm, complaint):
    job = parse_job(MINIMAL | {"search": {"algorithm": algorithm}}, "job.toml")
    with pytest.raises(UserError) as raised:
        check_names(job, "job.toml")
    assert str(raised.value).startswith(f"job.toml: search.algorithm = {algorithm!r} {complaint}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_of_the_table_may_be_named(algorithm):
    check_names(parse_job(MINIMAL | {"search": {"algorithm": algorithm}}, "job.toml"), "job.toml")


def test_a_missing_section_is_named():
    with pytest.raises(UserError, match="'data' is missing"):
        parse_job({}, "job.toml")


def test_a_misspelt_section_is_named_before_the_one_it_leaves_missing():
    with pytest.raises(UserError, match="unknown key 'dat'"):
        parse_job({"dat": MINIMAL["data"]}, "job.toml")


def test_a_file_that_is_not_toml_is_named(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text("seed = = 1")
    with pytest.raises(UserError, match=r"broken\.toml: .*line 1"):
        load_job(str(path))


def test_the_data_path_can_be_given_apart_from_the_job(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text('[data]\nsource = "tar"\npath = "here.tar"\n')
    assert load_job(str(path)).data.path == os.path.abspath("here.tar")
    assert load_job(str(path), "s3://there.tar").data.path == "s3://there.tar"


def test_a_job_survives_json():
    job = parse_job(MINIMAL | {"retrain": {"learning_rate": [0.1, 1.0]}}, "job.toml")
    assert Job.model_validate_json(job.model_dump_json()) == job


def test_a_job_cannot_be_altered():
    job = parse_job(MINIMAL, "job.toml")
    with pytest.raises(ValueError, match="frozen"):
        job.seed = 1


def test_published_recipe_is_the_default():
    """The published text (docs/spec.md, OneShot 2.2 and 3.1)."""
    defaults = SupernetConfig()
    assert (defaults.epochs, defaults.batch_size, defaults.learning_rate) == (120, 1024, 1.3)
    assert (defaults.channel_warmup_start, defaults.smallest_scale) == (60, 0.2)
    search = parse_job(MINIMAL, "job.toml").search
    assert (search.population_size, search.num_generations, search.num_parents) == (50, 20, 10)
    assert (search.random_parent_prob, search.mutation_prob) == (0.1, 0.1)
    assert search.calibration_images == 20_000


def test_what_begins_with_trained_weights_has_other_defaults():
    begun = SupernetConfig(init="supernet.pt")
    assert {key: getattr(begun, key) for key in FROM_INIT} == FROM_INIT
    own = SupernetConfig(init="supernet.pt", epochs=3, sampling="uniform")
    assert (own.epochs, own.batch_size, own.sampling) == (3, 32, "uniform")
    assert own.distillation == 0  # there are no soft labels
    assert SupernetConfig(init="a.pt", sampling="uniform", teacher="b.pt").distillation == 1
    assert SupernetConfig(init="supernet.pt", epochs=0).epochs == 0  # no warm-up is asked for
    assert SupernetConfig(init="a.pt", sampling="uniform", teacher_epochs=1).distillation == 1
    assert SupernetConfig(sampling="sandwich").distillation == 0
    assert SupernetConfig.model_validate(begun.model_dump()) == begun


def test_what_begins_with_trained_weights_is_shipped_with_them():
    for supernet in ({"init": "a.pt"}, SupernetConfig(init="a.pt")):
        job = Job.model_validate(MINIMAL | {"supernet": supernet})
        assert job.retrain.way == "supernet"
        assert {key: getattr(job.retrain, key) for key in FROM_SUPERNET} == FROM_SUPERNET
    begun = MINIMAL | {"supernet": {"init": "a.pt"}}
    longer = parse_job(begun | {"retrain": {"epochs": 3}}, "job.toml").retrain
    assert (longer.way, longer.epochs, longer.learning_rate) == ("fine-tuned", 3, 0.01)
    scratch = parse_job(begun | {"retrain": {"init": "scratch"}}, "job.toml").retrain
    assert scratch == RetrainConfig() and scratch.way == "scratch"
    also = [{"init": "supernet", "epochs": 3}, {"epochs": 90}]
    job = parse_job(begun | {"retrain": {"also": also}}, "job.toml")
    assert [each.way for each in job.retrain.ways] == ["supernet", "fine-tuned", "scratch"]
    assert [each.batch_size for each in job.retrain.ways] == [32, 32, 1024]
    assert Job.model_validate_json(job.model_dump_json()) == job


def test_a_file_to_begin_with_becomes_absolute_and_a_url_stays(tmp_path):
    path = tmp_path / "job.toml"
    for init, found in (("a.pt", os.path.abspath("a.pt")), ("https://host/a.pt?v=1",) * 2):
        path.write_text(f'[data]\nsource = "synthetic"\n[supernet]\ninit = "{init}"\n')
        assert load_job(str(path)).supernet.init == found


def test_the_imagenet_job_is_the_published_one():
    path = Path(__file__).parents[1] / "jobs" / "oneshot_imagenet.toml"
    job = load_job(str(path), "elsewhere")
    assert tomllib.loads(path.read_text())["data"]["source"] == "imagefolder"
    assert job.supernet == SupernetConfig()
    assert job.retrain.epochs == 360


@pytest.mark.parametrize(
    "given, chosen",
    [
        ({"evaluations": 3}, ("bayesian", 3, 1, 4)),
        ({"evaluations": 50}, ("bayesian", 10, 5, 4)),
        ({"evaluations": 1e3, "population_size": 2e1}, ("steady", 20, 50, 16)),
        ({"evaluations": 230}, ("bayesian", 20, 11, 8)),
        ({"evaluations": 3000}, ("steady", 20, 150, 16)),
        ({"evaluations": 100, "racing": True}, ("steady", 20, 5, 4)),
        ({"evaluations": 100, "algorithm": "genetic", "lag": 2}, ("genetic", 20, 9, 2)),
        ({"evaluations": 100, "population_size": 50}, ("bayesian", 50, 2, 4)),
        (
            {"evaluations": 60, "limits": [{"cost": "macs", "max": m} for m in (1e6, 2e6)]},
            ("front", 12, 5, 4),
        ),
        ({}, ("genetic", 50, 20, 16)),
    ],
)
def test_the_search_follows_from_the_evaluations_that_are_paid_for(given: dict, chosen: tuple):
    config = SearchConfig(**given)
    names = ("algorithm", "population_size", "num_generations", "lag")
    assert tuple(getattr(config, name) for name in names) == chosen
    assert SearchConfig(**config.model_dump()) == config  # as job.json records it
    assert not config.evaluations or config.most_evaluations <= config.evaluations


def test_more_generations_than_are_paid_for_are_refused():
    with pytest.raises(ValidationError, match="do not pay for 490: population_size = 50"):
        SearchConfig(evaluations=100, algorithm="genetic", population_size=50, num_generations=12)


TWO = [{"cost": "macs", "max": 1e6}, {"cost": "macs", "max": 2e6}]


@pytest.mark.parametrize(
    "given, complaint",
    [
        ({"evaluations": "1000"}, "input should be a valid integer, got '1000'"),
        ({"evaluations": True}, r"search\.evaluations: input should be a valid integer, got True"),
        ({"evaluations": 1.5}, r"search\.evaluations: input should be a valid integer, got 1\.5"),
        (
            {"evaluations": 100, "population_size": "20"},
            r"search\.population_size: input should be a valid integer, got '20'",
        ),
        ({"evaluations": 1}, "evaluations = 1 must be at least 3, or 0"),
        ({"evaluations": 2, "population_size": 3}, "evaluations = 2 must be at least 3, or 0"),
        (
            {"evaluations": 50, "population_size": 60},
            "first generation: population_size = 60; lower that, or raise evaluations",
        ),
        (
            {"evaluations": 50, "num_parents": 20},
            "num_parents must be below population_size = 10, got 20; lower it, or raise",
        ),
        (
            {"evaluations": 100, "racing": True, "limits": TWO},
            "evaluations = 100 chooses the front search.*; set racing to false, or name one",
        ),
    ],
)
def test_what_is_said_of_evaluations_names_what_was_given(given: dict, complaint: str):
    with pytest.raises(UserError, match=complaint):
        parse_job(MINIMAL | {"search": given}, "job.toml")


def test_what_is_said_of_evaluations_works_when_followed():
    for followed in (
        {"evaluations": 50, "num_parents": 9},
        {"evaluations": 50, "num_parents": 20, "population_size": 21},
        {"evaluations": 50, "population_size": 50},
        {"evaluations": 100, "limits": TWO},
        {"evaluations": 100, "racing": True, "limits": TWO, "algorithm": "steady"},
    ):
        config = SearchConfig(**followed)
        assert config.most_evaluations <= config.evaluations


def test_a_job_file_names_no_algorithm_beside_verify_but_the_front_search(tmp_path):
    path = tmp_path / "job.toml"
    text = '[data]\nsource = "synthetic"\n[search]\nverify = true\n'
    path.write_text(f'{text}algorithm = "random"\n')
    with pytest.raises(UserError, match="search.algorithm = 'random' proposes nothing with verify"):
        load_job(str(path))
    for line in ("", 'algorithm = "front"\n', "evaluations = 100\n"):
        path.write_text(text + line)
        job = load_job(str(path))
        assert job.search.verify
        assert Job.model_validate(job.model_dump()) == job  # as job.json records it


@pytest.mark.parametrize(
    ("value", "to"),
    [
        ("", ()),
        ("mlflow", ("mlflow",)),
        (["tensorboard", "wandb"], ("tensorboard", "wandb")),
        ({"to": "mlflow", "uri": "http://host:5000"}, ("mlflow",)),
    ],
)
def test_tracking_is_one_key_or_a_section(value, to):
    assert parse_job(MINIMAL | {"tracking": value}, "job").tracking.to == to


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("mlfow", "'mlfow'; did you mean 'mlflow'?"),
        ({"uri": "x"}, "uri = 'x' is of MLflow, which `to` does not name; add it there"),
    ],
)
def test_a_mistake_in_tracking_is_named(value, complaint):
    with pytest.raises(UserError, match=f"^job: tracking.*{re.escape(complaint)}"):
        parse_job(MINIMAL | {"tracking": value}, "job")

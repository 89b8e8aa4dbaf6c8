"""How well a supernet orders architectures whose truth is known."""

import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from nasray.cli.main import main
from nasray.cli.runs import _with_interval
from nasray.config import Job, Limit
from nasray.errors import EvaluationError, UserError
from nasray.evaluation.evaluator import Request
from nasray.pipeline.rank import (
    agreement,
    beyond,
    choose,
    draw_random,
    draw_within,
    folder_of,
    job_of_training,
    limits_to_draw_in,
    rank,
    read_truth,
    regret,
    resamples,
    spearman,
    top_tenth,
    train_some,
)
from nasray.pipeline.run import opened
from nasray.report.build import build_report
from nasray.search.candidate import FAILED, Evaluation
from nasray.search.history import History
from nasray.search.limits import Limits
from nasray.spaces import space_by_name
from nasray.spaces.space import Architecture
from nasray.storage import files as storage
from tests.conftest import FinishedRun

MACRO = space_by_name("nasbench_macro")
TABLES = Path(__file__).parents[2].parent / "shared/data/nasbench_macro"


def write(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


def test_measures_of_agreement():
    true = np.arange(20.0)
    assert spearman(true, true) == pytest.approx(1)
    assert spearman(-true, true) == pytest.approx(-1)
    assert spearman(np.ones(20), true) == 0
    assert spearman(np.array([1, 1, 2, 3]), np.array([1, 2, 3, 4])) == pytest.approx(
        0.9487, abs=1e-4
    )
    assert top_tenth(true, true) == 1
    assert top_tenth(np.roll(true, 1), true) == 0.5
    assert regret(np.where(true == 15, 99, true), true) == 4
    assert regret(np.ones(20), true) == pytest.approx(19 - true.mean())  # all rank first


def test_equal_ones_share_their_places_in_the_best_tenth():
    true = np.arange(20.0)
    assert top_tenth(np.ones(20), true) == top_tenth(np.ones(20), true[::-1]) == 2 / 20
    tied = np.where(true >= 17, 50.0, true)  # three for two places, two of them the best
    assert top_tenth(tied, true) == top_tenth(tied[::-1], true[::-1]) == pytest.approx(2 / 3)
    assert top_tenth(tied, tied) == top_tenth(true, tied) == 1
    assert top_tenth(true, np.where(true < 3, 50.0, true)) == 0


def test_no_minus_zero_is_shown():
    assert _with_interval(-1e-5, -1e-5, 1e-5) == "0.000 [0.000, 0.000]"


def test_equal_truths_have_no_order():
    truth = {(row,): 10.0 for row in range(4)}
    words = "t.csv: all 4 true values are 10, which have no order; give other ones .--value"
    with pytest.raises(UserError, match=words):
        choose(truth, 100, 0, "t.csv")
    with pytest.raises(UserError, match="all 3 true values are 10, .*; give a larger --sample"):
        choose(truth, 3, 0, "t.csv")
    assert sorted(choose(truth | {(0,): 11.0}, 100, 0, "t.csv")) == sorted(truth)


def test_too_few_within_the_limits_are_told_before_training():
    low, _ = Limits(MACRO, ()).bounds("macs")
    only = Limits(MACRO, [Limit(cost="macs", max=low)])
    with pytest.raises(UserError, match=r"--retrain 5: within .*macs.* only 1 arch.* --truth FILE"):
        draw_within(only, 5, 0)
    assert len(set(draw_within(Limits(MACRO, ()), 5, 0))) == 5


def test_the_truth_is_drawn_within_the_limits_of_one_answer():
    wide, narrow = Limit(cost="macs", max=3e8), Limit(cost="macs", max=1e8)
    params = Limit(cost="params", max=4e6)
    limits = [wide, narrow, params]

    def job(algorithm: str) -> Job:
        search = {"limits": limits, "algorithm": algorithm}
        return Job.model_validate({"data": {"source": "synthetic"}, "search": search})

    assert limits_to_draw_in(job("nsga2"), None) == [wide, params]
    assert limits_to_draw_in(job("nsga2"), wide) == [wide, params]
    assert limits_to_draw_in(job("nsga2"), narrow) == [narrow, params]
    assert limits_to_draw_in(job("genetic"), None) == limits


def test_intervals_hold_the_figure_and_shrink_with_more_architectures():
    widths = []
    for number in (20, 320):
        rng = np.random.default_rng(0)
        true = rng.normal(size=number)
        found = agreement(true + rng.normal(size=number), true, resamples(number, 0))
        figure, low, high = found["kendall_tau"]
        assert low < figure < high
        assert low < 0.5 < high  # Kendall's tau of a correlation of 0.71
        widths.append(high - low)
        assert found["regret"][1:] == [None, None]
    assert widths[1] < widths[0] / 2


def test_few_architectures_have_no_interval():
    true = np.arange(9.0)
    found = agreement(true, true, resamples(9, 0))
    assert found["kendall_tau"] == found["spearman"] == [pytest.approx(1), None, None]
    assert agreement(np.arange(10.0), np.arange(10.0), resamples(10, 0))["kendall_tau"] == [1] * 3


def test_two_rankers_are_compared_in_pairs():
    """Orders that are nearly the same: each is uncertain, the difference is not."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=100)
    macs = true + rng.normal(size=100)
    values = macs + 0.1 * rng.normal(size=100)
    rows = resamples(100, 0)
    difference, low, high = beyond(values, macs, true, rows)
    taus = [agreement(each, true, rows)["kendall_tau"] for each in (values, macs)]
    assert difference == taus[0][0] - taus[1][0]
    assert low < difference < high and high - low < (taus[0][2] - taus[0][1]) / 2


@pytest.mark.parametrize(
    "name, content, column",
    [
        ("t.csv", "arch,acc0,mean_acc\n22212220,92,93.1\n00000000,45,45.4\n", ""),
        ("t.csv", 'genes,x\n"[2,2,2,1,2,2,2,0]",93.1\n"[0,0,0,0,0,0,0,0]",45.4\n', "x"),
        ("t.json", '{"22212220": {"mean_acc": 93.1}, "00000000": {"mean_acc": 45.4}}', ""),
        ("t.JSON", '{"22212220": 93.1, "00000000": 45.4}', ""),
        (
            "t.json",
            '[{"arch": "best", "top1": 93.1}, {"arch": {"arch": "00000000"}, "top1": 45.4}]',
            "",
        ),
    ],
)
def test_tables_of_many_kinds_are_read(name: str, content: str, column: str, tmp_path: Path):
    found = read_truth(write(tmp_path / name, content), MACRO, column)
    assert found == {(2, 2, 2, 1, 2, 2, 2, 0): 93.1, (0,) * 8: 45.4}


def test_several_rows_of_one_network_are_averaged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = write(tmp_path / "t.csv", "arch,value\n00000010,64\n00000001,64\n")
    assert read_truth(path, MACRO) == {(0, 0, 0, 0, 0, 0, 1, 0): 64.0}
    assert not caplog.messages
    path = write(tmp_path / "t.csv", "arch,value\n00000010,64\n00000001,66\n")
    assert read_truth(path, MACRO) == {(0, 0, 0, 0, 0, 0, 1, 0): 65.0}
    words = "t.csv: value differs between rows of one network, which are averaged (of 1 arch"
    assert words in caplog.text and caplog.text.rstrip().endswith("with 64, 66)")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("t.csv", "arch,mean_acc\n99912220,1\n", "row 1: nasbench_macro: gene layer0 = 9 must be"),
        ("t.csv", "arch,mean_acc\n2221222,1\n", "row 1: 2221222 is no architecture"),
        ("t.csv", "arch,mean_acc\n22212220,good\n", "row 1: mean_acc = 'good' is no finite number"),
        ("t.csv", "arch,mean_acc\n22212220,nan\n", "row 1: mean_acc = 'nan' is no finite number"),
        ("t.csv", "arch,score\n22212220,1\n", "no column for the true value, .* --value NAME"),
        ("t.csv", "net,value\n22212220,1\n", "no column for the architecture, .* are net, value"),
        ("t.csv", "arch,value\n", "has no rows"),
        ("t.json", "[1, 2]", "neither an object by architecture nor a list"),
        ("t.json", "{", "no JSON"),
        (
            "t.csv",
            "arch,value\n22212220,50\n00000000,0.9\n",
            "value = 0.9 in row 2 and 50 in row 1, fractions and percent .*; divide those in perc",
        ),
        ("t.csv", "arch,acc,acc\n22212220,1,2\n", "two columns are called acc; rename one"),
        ("t.json", '{"22212220": true}', "row 1: value = True is no finite number"),
        ("t.json", '{"22212220": 1, "22212220": 2}', r"t\.json: '22212220' is twice in one obj"),
        ("t.jsonl", '{"arch": "22212220", "top1": 1}\n', "t.jsonl: JSON lines; give a JSON list"),
        (
            "t.json",
            '[{"arch": "22212220", "top1": 0.9}, {"architecture": "00000000", "top1": 0.4}]',
            "row 2: no 'arch'; there are architecture, top1; all rows need the same names",
        ),
    ],
)
def test_mistakes_in_a_table_are_named(name: str, content: str, words: str, tmp_path: Path):
    with pytest.raises(UserError, match=words) as told:
        read_truth(write(tmp_path / name, content), MACRO)
    assert str(told.value).count("--truth") == 1


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_table_in_another_encoding(encoding: str, tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_bytes("arch,value,größe\n22212220,1,2\n".encode(encoding))
    with pytest.raises(UserError, match=r"t\.csv is not in UTF-8; save it as CSV in UTF-8"):
        read_truth(str(path), MACRO)


def test_a_folder_is_no_table(tmp_path: Path):
    with pytest.raises(UserError, match="--truth .*; give a CSV or JSON file"):
        read_truth(str(tmp_path), MACRO)


def test_a_column_that_is_not_there(tmp_path: Path):
    path = write(tmp_path / "t.csv", "arch,value\n22212220,1\n")
    with pytest.raises(UserError, match="true value, .* val; there are arch, value; --value NAME"):
        read_truth(path, MACRO, "val")


def test_architectures_are_no_values(tmp_path: Path):
    path = write(tmp_path / "t.csv", "arch,value\n22212220,1\n")
    with pytest.raises(UserError, match="--value arch is the column of the architectures; give"):
        read_truth(path, MACRO, "arch")


@pytest.mark.parametrize("values", [(0.1, 75), (1, 70), (0.5, 3), (-60, 0.5), (0, 0.9)])
def test_values_that_may_be_of_one_unit(values: tuple[float, float], tmp_path: Path):
    rows = [f"{arch},{value}" for arch, value in zip(("22212220", "0" * 8), values, strict=True)]
    path = write(tmp_path / "t.csv", "\n".join(["arch,value", *rows]))
    assert tuple(read_truth(path, MACRO).values()) == values


def test_a_table_that_is_not_there():
    with pytest.raises(UserError, match=r"--truth gone\.csv does not exist"):
        read_truth("gone.csv", MACRO)


@pytest.mark.skipif(not TABLES.exists(), reason="NAS-Bench-Macro's tables are not here")
def test_the_published_tables_are_read():
    by_name = read_truth(str(TABLES / "nas-bench-macro_cifar10.json"), MACRO)
    distinct = read_truth(str(TABLES / "nas-bench-macro_unique3969.csv"), MACRO)
    assert len(by_name) == len(distinct) == 3969
    assert max(distinct.values()) == pytest.approx(93.13, abs=0.01)


def test_a_run_is_ranked_once(ray_cluster: None, finished_run: FinishedRun, tmp_path: Path):
    """Truth that is the number of MACs: by MACs the order is perfect; nothing is done twice. The
    answer is compared with what is within the limits of the search only.
    """
    pick = tuple(storage.read_json(f"{finished_run.folder}/search.json")["winner"]["genes"])
    with opened(finished_run.folder) as run:
        every = Limits(run.space, ()).draw(40, np.random.default_rng(5), {pick})
        archs = sorted(every, key=lambda arch: run.limits.costs([arch])[0]["macs"])[7::8]
        known = [*archs, pick]
        costs = [cost["macs"] for cost in run.limits.costs(known)]
        truth = dict(zip(known, costs, strict=True))
        found = rank(run, truth, 6, "made up")
        assert found["num_archs"] == len(found["supernet"]) == 6 and found["num_failed"] == 0
        assert found["rankers"]["macs"]["kendall_tau"][0] == 1
        assert found["rankers"]["macs"]["regret"][0] == 0
        tau = found["rankers"]["supernet"]["kendall_tau"][0]
        assert found["beyond_macs"] == [tau - 1, None, None]
        within = [cost for cost in costs[:-1] if cost <= run.job.search.limits[0].max]
        assert 0 < len(within) < 5
        worth, own = found["pick"], truth[pick]
        assert worth["genes"] == list(pick) and worth["true"] == own
        assert worth["regret"] == max(*within, own) - own
        assert worth["num_known"] == len(within) + 1 and worth["num_others"] == len(within)
        assert worth["better_than"] == np.mean(np.array(within) < own)
        before = len(History(run.path("history"), "ranked").candidates)
        assert rank(run, truth, 6, "made up") == found
        assert len(History(run.path("history"), "ranked").candidates) == before
        apart = rank(run, {arch: truth[arch] for arch in archs}, 6, "made up", {pick: own})
        assert list(pick) not in apart["archs"] and apart["num_archs"] == 5
        assert apart["pick"] == worth
    build_report(finished_run.folder)
    assert "The supernet's order and the true one" in Path(
        finished_run.folder, "report.html"
    ).read_text().replace("&#39;", "'")


@pytest.fixture
def copied(finished_run: FinishedRun, tmp_path: Path) -> Path:
    """A finished run that nothing was ranked in."""
    folder = tmp_path / "run"
    shutil.copytree(finished_run.folder, folder)
    (folder / "rank.json").unlink(missing_ok=True)
    for path in (folder / "history").glob("ranked*"):
        path.unlink()
    return folder


class FailingPool:
    """Evaluates all but one architecture."""

    def __init__(self, failing: Architecture) -> None:
        self.failing, self.asked = failing, []

    def evaluate(self, requests: Sequence[Request]) -> list[Evaluation]:
        self.asked += [each.arch for each in requests]
        return [
            Evaluation(fitness=FAILED, error="out of memory")
            if each.arch == self.failing
            else Evaluation(fitness=0.5, images=32, correct=bytes(4))
            for each in requests
        ]


def test_what_cannot_be_evaluated_is_left_out(copied: Path, monkeypatch: pytest.MonkeyPatch):
    with opened(str(copied)) as run:
        seen = {each.arch for each in run.candidates}
        archs = run.limits.draw(5, np.random.default_rng(5), seen)
        truth = dict(zip(archs, range(5), strict=True))
        pool = FailingPool(archs[2])
        monkeypatch.setattr("nasray.pipeline.rank.evaluators", lambda run: nullcontext(pool))
        found = rank(run, truth, 5, "made up")
        assert found["num_archs"] == 4 and found["num_failed"] == 1
        assert "out of memory" in found["first_failed"]
        assert list(archs[2]) not in found["archs"]
        assert rank(run, truth, 5, "made up") == found
        assert len(pool.asked) == 6 and pool.asked[-1] == archs[2]  # it alone is tried again
        with pytest.raises(EvaluationError, match="1 of 3 architectures cannot be .* memory"):
            rank(run, {arch: truth[arch] for arch in archs[:3]}, 3, "made up")


def test_a_folder_tells_by_what_its_network_was_trained(finished_run: FinishedRun):
    with opened(finished_run.folder) as run:
        job = job_of_training(run.job, 2)
    assert (job.retrain.init, job.retrain.epochs, job.retrain.num_trials) == ("scratch", 2, 1)

    def name(section: str = "retrain", **changes: Any) -> str:
        other = getattr(job, section).model_copy(update=changes)
        return folder_of(job.model_copy(update={section: other}), (0, 1, 2))

    assert name().startswith("2-") and name().endswith("-0-1-2")
    assert name(learning_rate=0.7) != name() != name("compute", workers_per_trial=3)
    assert name(compile=True) == name() == name("compute", concurrent_trials=3)


@pytest.mark.slow
def test_the_truth_is_trained_and_the_answer_is_no_random_one(ray_cluster: None, copied: Path):
    pick = tuple(storage.read_json(str(copied / "search.json"))["winner"]["genes"])
    with opened(str(copied)) as run:
        drawn, within = draw_random(run, 3)
        assert within == run.job.search.limits[0].text
        truth, of_pick = train_some(run, drawn, 1)
        assert len(truth) == 3 and list(of_pick) == [pick]
        trained = set(storage.list_names(str(copied / "ranked")))
        assert len(trained) == len({*truth, pick})
        assert train_some(run, drawn, 1) == (truth, of_pick)
        section = run.job.retrain.model_copy(update={"learning_rate": 1e30})
        diverging = replace(run, job=run.job.model_copy(update={"retrain": section}))
        words = "loss became .*; change .retrain. in the job, record it by `nasray retrain JOB"
        with pytest.raises(UserError, match=words):
            train_some(diverging, drawn, 1)
        others = set(storage.list_names(str(copied / "ranked"))) - trained
        assert len(others) == len(trained)  # what the other recipe trained is not taken for it


def test_the_command_says_what_it_needs(finished_run: FinishedRun):
    def said(*options: str) -> str:
        return CliRunner().invoke(main, ["rank", finished_run.folder, *options]).stderr

    assert "give a file of true values (--truth), or --retrain K" in said()
    path = write(Path(finished_run.folder).parent / "t.json", json.dumps({"000": 1}))
    assert f"--truth {path}, row 1:" in said("--truth", path)


@pytest.mark.parametrize(
    "options, words",
    [
        ("--truth t.csv --epochs 3", "--epochs goes with --retrain, not with --truth; leave it"),
        ("--retrain 3 --value top1", "--value goes with --truth, not with --retrain; leave it"),
        ("--retrain 3 --sample 5", "--sample goes with --truth, not with --retrain; leave it"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(options: str, words: str, tmp_path: Path):
    job = Job.model_validate({"data": {"source": "synthetic"}})
    write(tmp_path / "job.json", job.model_dump_json())
    found = CliRunner().invoke(main, ["rank", str(tmp_path), *options.split()])
    assert words in found.stderr and found.exit_code == 1

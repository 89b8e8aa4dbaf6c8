"""How well a supernet orders architectures whose truth is known."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from nasray.cli.main import main
from nasray.errors import UserError
from nasray.pipeline.rank import agreement, rank, read_truth, regret, spearman, top_tenth
from nasray.pipeline.run import opened
from nasray.report.build import build_report
from nasray.search.history import History
from nasray.spaces import space_by_name
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


def test_intervals_hold_the_figure_and_shrink_with_more_architectures():
    widths = []
    for number in (20, 320):
        rng = np.random.default_rng(0)
        true = rng.normal(size=number)
        figure, low, high = agreement(true + rng.normal(size=number), true, 0)["kendall_tau"]
        assert low < figure < high
        assert low < 0.5 < high  # Kendall's tau of a correlation of 0.71
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


@pytest.mark.parametrize(
    "name, content, column",
    [
        ("t.csv", "arch,acc0,mean_acc\n22212220,92,93.1\n00000000,45,45.4\n", ""),
        ("t.csv", 'genes,x\n"[2,2,2,1,2,2,2,0]",93.1\n"[0,0,0,0,0,0,0,0]",45.4\n', "x"),
        ("t.json", '{"22212220": {"mean_acc": 93.1}, "00000000": {"mean_acc": 45.4}}', ""),
        ("t.json", '{"22212220": 93.1, "00000000": 45.4}', ""),
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


def test_several_names_of_one_network_are_averaged(tmp_path: Path):
    path = write(tmp_path / "t.csv", "arch,value\n00000010,64\n00000001,66\n")
    assert read_truth(path, MACRO) == {(0, 0, 0, 0, 0, 0, 1, 0): 65.0}


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
    ],
)
def test_mistakes_in_a_table_are_named(name: str, content: str, words: str, tmp_path: Path):
    with pytest.raises(UserError, match=words):
        read_truth(write(tmp_path / name, content), MACRO)


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
    """Truth that is the number of MACs: by MACs the order is perfect; nothing is done twice."""
    with opened(finished_run.folder) as run:
        archs = run.limits.draw(6, np.random.default_rng(5), set())
        costs = [cost["macs"] for cost in run.limits.costs(archs)]
        truth = dict(zip(archs, costs, strict=True))
        found = rank(run, truth, 5, "made up")
        assert found["num_archs"] == len(found["supernet"]) == 5
        assert found["rankers"]["macs"]["kendall_tau"][0] == 1
        assert found["rankers"]["macs"]["regret"][0] == 0
        before = len(History(run.path("history"), "ranked").candidates)
        assert rank(run, truth, 5, "made up") == found
        assert len(History(run.path("history"), "ranked").candidates) == before
    build_report(finished_run.folder)
    assert "The supernet's order and the true one" in Path(
        finished_run.folder, "report.html"
    ).read_text().replace("&#39;", "'")


def test_the_command_says_what_it_needs(finished_run: FinishedRun):
    def said(*options: str) -> str:
        return CliRunner().invoke(main, ["rank", finished_run.folder, *options]).stderr

    assert "give a file of true values (--truth), or --retrain K" in said()
    path = write(Path(finished_run.folder).parent / "t.json", json.dumps({"000": 1}))
    assert f"--truth {path}, row 1:" in said("--truth", path)

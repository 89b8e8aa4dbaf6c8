"""The verbs that need no cluster; those that do are in test_run.py."""

import json
import sys

import pytest
from click.testing import CliRunner

import nasray
from nasray.algorithms import annealing
from nasray.cli import runs
from nasray.cli.main import main
from nasray.spaces.tiny import Tiny
from nasray.storage import files as storage
from tests.predictors.test_predictor import random_predictor


@pytest.fixture
def invoke():
    def call(*arguments):
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return call


def test_profile_prints_the_published_totals(invoke):
    result = invoke("profile", "shufflenet", "oneshot-s+")
    assert result.exit_code == 0
    assert "3.652     299.6     288.3     587.9" in result.output
    assert "MicroNet score int8 (int32 accumulators): 0.4615" in result.output


def test_profile_json_is_one_object_a_line(invoke):
    arch = json.dumps({"block": [0] * 20, "channel": [2] * 20})
    result = invoke("profile", "shufflenet", "oneshot-s+", arch, "--json")
    published, smallest = map(json.loads, result.output.splitlines())
    assert published["macs"] == 291475944
    assert published["micronet_score"] == pytest.approx(1.0318, abs=5e-5)
    assert smallest["macs"] == 168064936
    assert smallest["arch"] == json.loads(arch)


@pytest.mark.parametrize(
    ("options", "macs"),
    [
        ([], 291475944),
        (["--no-se"], 322327016),
        (["--head", "shufflenetv2plus"], 315994408),
        (["--layout", "shufflenetv2plus"], 189272970),
    ],
)
def test_profile_options_choose_the_configuration(invoke, options, macs):
    result = invoke("profile", "shufflenet", "oneshot-s+", "--json", *options)
    assert json.loads(result.output)["macs"] == macs


def test_micronet_prints_the_scores_of_each_network(invoke):
    result = invoke("micronet", "shufflenet", "oneshot-s+", "oneshot")
    assert result.exit_code == 0
    assert result.output.splitlines()[0] == "oneshot-s+"
    assert (
        "int8       int32            1.012      80.0     288.3     368.3   0.4615" in result.output
    )
    assert "int8: Conv2d, Linear, ReLU, ReLU6; what else there is counts as" in result.output


@pytest.mark.parametrize(
    ("options", "scores"),
    [
        ([], (1.0318, 0.6391, 0.4615)),
        (["--strict"], (1.0379, 0.6442, 0.4675)),
        (["--int8", "ReLU, Conv2d"], (1.0318, 0.6391, 0.4615)),
    ],
)
def test_micronet_json_is_one_object_a_line(invoke, options, scores):
    result = invoke("micronet", "shufflenet", "oneshot-s+", "--json", *options)
    found = json.loads(result.output)
    assert found["arch"] == nasray.space("shufflenet").describe("oneshot-s+")
    assert [row["precision"] for row in found["scores"]] == ["fp32", "fp16", "int8"]
    assert [row["accumulator"] for row in found["scores"]] == ["fp32", "fp32", "int32"]
    assert [row["score"] for row in found["scores"]] == pytest.approx(scores, abs=5e-5)
    for row in found["scores"]:
        assert row["mults"] + row["adds"] == row["ops"]


def test_micronet_counts_the_configuration_that_its_options_choose(invoke):
    result = invoke("micronet", "shufflenet", "oneshot-s+", "--json", "--no-se")
    costs = nasray.space("shufflenet", se=False, head="spos").costs("oneshot-s+")
    assert json.loads(result.output)["scores"][0]["score"] == costs["micronet_score"]


def test_the_published_micronet_table_is_beside_what_is_counted_here(invoke):
    text = invoke("micronet", "--published").output
    assert text.count("differs") == 2
    assert "1.05       1.068  differs" in text
    assert "fp16       fp32             1.826     149.8     288.3     438.1   0.6391" in text
    assert text.index("which the rules forbid") < text.index("149.2   0.2646")
    found = json.loads(invoke("micronet", "--published", "--json").output)
    assert [row["network"] for row in found["published"]][-1] == "MobileNetV2-1.4"
    assert len(found["published"]) == 13
    assert [row["score"] for row in found["oneshot-s+"]["scores"]] == pytest.approx(
        [1.0318, 0.6391, 0.4615], abs=5e-5
    )
    assert found["oneshot-s+"]["int8_as_published"]["accumulator"] == "int8"


def test_classes_and_resolution_change_the_costs(invoke):
    result = invoke(
        *("profile", "shufflenet", "oneshot-s+", "--json"),
        *("--num-classes", 10, "--resolution", 64),
    )
    found = json.loads(result.output)
    assert found["params"] == 3541829 - 990 * 1025
    assert found["macs"] < 291475944 / 10


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ("profile", "shufflnet", "oneshot"),
            "'shufflnet' is unknown; did you mean 'shufflenet'? there are",
        ),
        (("profile", "shufflenet", "twoshot"), "neither a published name (oneshot-s+, oneshot)"),
        (("profile", "shufflenet", '{"block": [1]}'), "has the keys ['block', 'channel']"),
        (("profile", "shufflenet", "oneshot", "--layout", "x"), "space.layout = 'x'"),
        (("profile", "shufflenet", "oneshot", "--resolution", 65), "space.resolution = 65"),
        (("profile", "tiny", "largest", "--layout", "oneshot"), "unknown key 'space.layout'"),
        (("profile", "shufflenet", "[" * 100_000), "neither a published name"),
        (("profile", "shufflenet", "9" * 10_000), "neither a published name"),
        (("profile", "tiny", "largest", "--latency-table", "x.csv"), "--json; give that too"),
        (("profile", "tiny", "largest", "--json", "--latency-table", "x.csv"), "x.csv"),
        (("profile", "tiny", "largest", "--set", "num_blocks"), "must be KEY=VALUE"),
        (("micronet",), "give a SPACE and an ARCH, a RUN_DIR, or --published"),
        (("micronet", "shufflenet"), "shufflenet is a space: give an ARCH, too"),
        (("micronet", "nowhere"), "is not a run directory"),
        (("micronet", "nowhere", "--num-classes", 10), "--num-classes chooses a configuration of"),
        (("micronet", "--published", "shufflenet"), "leave shufflenet out"),
        (("micronet", "--published", "nowhere"), "is not a run directory"),
        (("micronet", "--published", "--no-se"), "--se chooses a configuration of SPACE"),
        (("micronet", "tiny", "largest", "--int8", "Conv"), "no operation is a 'Conv'; there are"),
        (("show", "shufflenet", "oneshot"), "shufflenet has no module strings"),
        (("measure-latency", "tiny", "x.csv", "--resolutions", "a"), "'a' is no number"),
        (("measure-latency", "tiny", "x.csv", "--label", "a=b"), "give --address too"),
        (("measure-latency", "tiny", "x.csv", "--precision", "fp16"), "give fp32 or int8"),
        (("measure-latency", "tiny", "x.csv", "--cpus", "4-"), "must be numbers of cores, e.g."),
        (
            ("measure-latency", "tiny", "x.csv", "--host", "me@board"),
            "runtime = 'onnxruntime' only",
        ),
        (
            ("measure-latency", "tiny", "x.csv", "--host", "me@board", "--address", "auto"),
            "--host me@board is no node of the cluster auto; give one of them",
        ),
        (("front", "tiny", "--predictor", "x", "--limit", "nan"), "nan must be a finite number"),
        (("front", "tiny", "--predictor", "x.pt", "--limit", "1"), "x.pt does not exist"),
        (("profile", "tiny", "smallest", "--set", "name=x"), "is the argument SPACE"),
        (("run", "no.toml", "out"), "job no.toml: No such file or directory"),
        (("report", "nowhere"), "nowhere"),
        (("evaluate", "nowhere", "oneshot"), "is not a run directory"),
        (("export", "nowhere"), "is not a run directory"),
        (("data", "import", "tar", "out", "--path", "no.tar"), "no.tar"),
        (("data", "import", "tar", "out"), "needs `path`"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(invoke, tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 1
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    assert complaint in line
    assert not list(tmp_path.iterdir())  # nothing is left behind


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[space]\nname = "shuflenet"', "job.toml: space.name = 'shuflenet' is unknown"),
        ("[space]\nlayot = 1", "job.toml: unknown key 'space.layot'"),
        ('[[search.limits]]\ncost = "mac"\nmax = 1', "job.toml: search.limits: cost 'mac'"),
    ],
)
def test_a_name_that_does_not_exist_is_found_before_a_run_begins(
    invoke, tmp_path, monkeypatch, text, complaint
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text(f'[data]\nsource = "synthetic"\n{text}\n')
    result = invoke("run", "job.toml", "out")
    assert result.exit_code == 1
    assert complaint in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_that_could_not_export_its_model_does_not_begin(invoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    (tmp_path / "job.toml").write_text('[data]\nsource = "synthetic"\n')
    result = invoke("run", "job.toml", "out")
    assert result.exit_code == 1
    assert "a run ends with needs onnxscript: pip install '.[export]'" in result.stderr
    assert not (tmp_path / "out").exists()


def test_front_has_a_budget_for_the_number_of_limits(invoke, tmp_path, monkeypatch):
    """By the searches that it really does; the same limit twice is one."""
    searches = []

    class Recorded(annealing.Annealing):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            searches.append(self)

    monkeypatch.setattr(annealing, "Annealing", Recorded)
    monkeypatch.setattr(annealing, "FURTHER_LIMIT", 1000)
    random_predictor(Tiny(num_classes=1000)).save(f"{tmp_path}/predictor.pt")
    found = []
    for options in (["--limit=7e5"] * 2, ["--limit=7e5", "--limit=9e5"], ["--budget=1000"]):
        result = invoke(
            "front", "tiny", f"--predictor={tmp_path}/predictor.pt", "--limit=7e5", *options
        )
        assert result.exit_code == 0, result.output
        found.append([json.loads(line) for line in result.stdout.splitlines()])
    assert [search.budget for search in searches] == [50_000, 51_000, 1000]
    assert all(search.told >= search.budget for search in searches)
    for answers in found:
        assert all(answer["macs"] <= answer["limit"] for answer in answers)
        assert answers[0] == found[0][0]


def test_a_search_without_a_supernet_says_what_to_do_first(invoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text('\ufeff[data]\nsource = "synthetic"\n')  # with a BOM
    result = invoke("search", "job.toml", "out")
    assert result.exit_code == 1
    assert "out has no trained supernet; run `nasray train` first" in result.stderr


def test_a_measured_table_is_checked_and_looked_up(invoke, tmp_path):
    table = str(tmp_path / "tiny.csv")
    options = ("--resolution", 32)
    # On stderr, both may say that something else runs on this machine.
    assert invoke("measure-latency", "tiny", table, *options).stdout.endswith(f"{table}\n")
    lines = invoke("latency", "check", "tiny", table, "--num-archs", 4, *options)
    archs = lines.stdout.splitlines()
    assert len(archs) == 4 and "rank correlation" in lines.stderr
    line = json.loads(archs[0])
    looked_up = invoke(
        "profile", "tiny", json.dumps(line["arch"]), "--json", "--latency-table", table, *options
    )
    assert json.loads(looked_up.output)["latency_ms"] == pytest.approx(line["predicted_ms"])


def test_module_strings_come_back_as_the_architecture(invoke, tmp_path):
    strings = tmp_path / "strings"
    strings.write_text(invoke("show", "ofa_mobilenetv3", "smallest").output)
    assert strings.read_text().endswith("resolution 160\n")
    arch = json.loads(invoke("show", "ofa_mobilenetv3", "--parse", strings).output)
    assert arch["r"] == 160 and arch["d"] == [2] * 5
    strings.write_text(invoke("show", "ofa_mobilenetv3", "smallest", "largest").output)
    both = invoke("show", "ofa_mobilenetv3", "--parse", strings).output.splitlines()
    assert [json.loads(line)["r"] for line in both] == [160, 224]
    strings.write_text(strings.read_text().replace("resolution 224", "resolution " + "2" * 5000))
    result = invoke("show", "ofa_mobilenetv3", "--parse", strings)
    assert result.stderr.startswith(f"Error: --parse {strings}, network 2: ")
    profile = invoke("profile", "ofa_mobilenetv3", json.dumps(arch), "--json")
    assert json.loads(profile.output)["arch"] == arch


def test_what_cannot_be_parsed_is_named_with_its_file(invoke, tmp_path):
    binary, text = tmp_path / "binary", tmp_path / "text"
    binary.write_bytes(b"\x80\x02")
    text.write_text("hello\n")
    result = invoke("show", "ofa_mobilenetv3", "--parse", binary)
    assert result.stderr == f"Error: --parse {binary}: is not text\n"
    result = invoke("show", "ofa_mobilenetv3", "--parse", text)
    assert result.stderr.startswith(f"Error: --parse {text}: ")


def test_every_space_is_shown_at_its_own_resolution(invoke):
    assert invoke("show", "ofa_resnet50d", "largest").output.endswith("resolution 256\n")
    assert invoke("show", "ofa_resnet50d", "largest", "--resolution", 224).exit_code == 1


def test_spaces_lists_sizes_and_published_names(invoke):
    result = invoke("spaces")
    assert "shufflenet: 40 genes, 1.27e+30 architectures; named: oneshot-s+, oneshot" in (
        result.output
    )
    # The printed networks (docs/spec.md, OFA 1.6), each once.
    assert "ofa_mobilenetv3: 46 genes, 1.09e+20 architectures" in result.output


def test_show_refuses_what_would_be_without_effect(invoke):
    assert invoke("show", "ofa_mobilenetv3").stderr == "Error: give an ARCH, or --parse FILE\n"
    result = invoke("show", "ofa_mobilenetv3", "smallest", "--at", "192")
    assert result.stderr.startswith("Error: --at 192 goes with --parse")


def test_every_verb_explains_itself(invoke):
    for verb in main.commands:
        result = invoke(verb, "--help")
        assert result.exit_code == 0
        assert len(result.output.splitlines()) > 4


@pytest.mark.parametrize(
    ("balanced", "said"), [(0.5, " (50.0% as the mean over the classes)"), (0.9, "")]
)
def test_a_finished_run_prints_balanced_top1_where_it_differs(tmp_path, capsys, balanced, said):
    result = {"val_top1": 0.9, "val_balanced_top1": balanced, "num_val_images": 40}
    result["costs"] = {"params": 1e6, "macs": 2e6}
    storage.write_json(f"{tmp_path}/retrain/0/result.json", result)
    baseline = {"num_images": 40, "winner_top1": 0.8, "random_top1": [0.7]}
    storage.write_json(
        f"{tmp_path}/search.json", {"baseline": baseline | {"random_mean_top1": 0.7}}
    )
    storage.write_json(f"{tmp_path}/job.json", {"job": {"search": {"fitness": "balanced"}}})
    runs._summarise(nasray.RunDirectory(str(tmp_path)))
    found = capsys.readouterr().out
    assert f"Retrained from scratch: 90.0% top-1{said} on 40 validation images" in found
    assert "40 validation images, mean over the classes: 80.0%; random subnets" in found

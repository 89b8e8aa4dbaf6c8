"""A report shows what a run directory holds, whatever that is, and fetches nothing."""

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nasray.errors import UserError
from nasray.report import figures
from nasray.report.build import build_report
from nasray.report.drawing import architecture_svg
from nasray.search.candidate import Candidate, best_first, pareto_front
from nasray.search.history import History
from nasray.search.scores import Predictions
from nasray.storage import files as storage

NUM_GENERATIONS, POPULATION_SIZE = 12, 30
MAX_MACS = 330e6
VERSIONS = {"nasray": "0.1.0", "torch": "2.15.0", "ray": "2.60.0", "python": "3.11.9"}


def make_candidate(rng: np.random.Generator, generation: int) -> Candidate:
    """Draw an architecture of the ShuffleNet space; later generations are better on average."""
    ops = rng.integers(0, 4, 20)
    scales = np.clip(rng.normal(5.5 - 0.1 * generation, 2, 20).round(), 0, 9).astype(int)
    size = (scales + 1).mean() / 5.5  # 1.0: the average channel scale
    macs, params = 290e6 * size * rng.normal(1, 0.03), 3.4e6 * size**0.5
    fitness = 0.54 + 0.05 * size + 0.005 * generation + rng.normal(0, 0.012)
    costs = {"params": params, "macs": macs, "micronet_params": params * 1.03}
    costs |= {"mults": macs * 1.03, "adds": macs * 0.99}
    costs["micronet_score"] = costs["micronet_params"] / 6.9e6 + 2.02 * macs / 1170e6
    arch = tuple(int(gene) for pair in zip(ops, scales, strict=True) for gene in pair)
    return Candidate(arch=arch, fitness=fitness, costs=costs, generation=generation, seconds=8.5)


def entry(candidate: Candidate) -> dict:
    arch = {"block": list(candidate.arch[0::2]), "channel": list(candidate.arch[1::2])}
    genes = list(candidate.arch)
    return {"arch": arch, "genes": genes, "fitness": candidate.fitness} | candidate.costs


def write_job(run_dir: str) -> None:
    job = {
        "seed": 7,
        "space": {"name": "shufflenet", "resolution": 224, "layout": "oneshot"},
        "data": {"source": "imagefolder", "path": "s3://images/flowers"},
    }
    started = "2026-03-04T05:06:07+00:00"
    storage.write_json(
        f"{run_dir}/job.json", {"job": job, "versions": VERSIONS, "started": started}
    )


def write_training(run_dir: str) -> None:
    rng = np.random.default_rng(1)
    rows = [
        {
            "epoch": epoch,
            "loss": 1.9 + 5 * math.exp(-epoch / 20) + rng.normal(0, 0.03),
            "train_top1": 0.55 * (1 - math.exp(-epoch / 30)) + rng.normal(0, 0.004),
            "val_top1": 0.62 * (1 - math.exp(-epoch / 30)) if epoch % 5 == 4 else None,
            "learning_rate": 0.65 * (1 + math.cos(math.pi * epoch / 120)),
            "lowest_scale": max(0.2, 2.0 - 0.2 * max(0, (epoch - 56) // 4)),
            "seconds": 310.0,
        }
        for epoch in range(120)
    ]
    storage.write_json(f"{run_dir}/curves/supernet.json", rows)


def write_search(run_dir: str) -> Candidate:
    """Record a whole search; return its winner."""
    rng = np.random.default_rng(0)
    history = History(f"{run_dir}/history")
    for generation in range(NUM_GENERATIONS):
        drawn = [make_candidate(rng, generation) for _ in range(4 * POPULATION_SIZE)]
        feasible = [candidate for candidate in drawn if candidate.costs["macs"] <= MAX_MACS]
        history.append(feasible[:POPULATION_SIZE])
    ranked = best_first(history.candidates)
    front = pareto_front(history.candidates, "macs")
    storage.write_json(f"{run_dir}/front.json", [entry(candidate) for candidate in front])
    storage.write_json(f"{run_dir}/top.json", [entry(candidate) for candidate in ranked[:3]])
    random_top1 = rng.normal(0.6, 0.01, 10).tolist()
    baseline = {"winner_top1": 0.655, "random_top1": random_top1, "num_images": 10_000}
    baseline["random_mean_top1"] = float(np.mean(random_top1))
    result = {
        "num_evaluations": len(history.candidates),
        "seconds": 3060.0,
        "limits": [{"cost": "macs", "max": MAX_MACS, "min": None}],
        "front_cost": "macs",
        "baseline": baseline,
        "winner": entry(ranked[0]),
    }
    storage.write_json(f"{run_dir}/search.json", result)
    return ranked[0]


def write_retraining(run_dir: str, winner: Candidate) -> None:
    rng = np.random.default_rng(2)
    trials = []
    for trial, rate in enumerate((0.4, 1.3, 0.9)):
        num_epochs = 90 if trial == 1 else 360
        rises = [1 - math.exp(-epoch / 60) for epoch in range(num_epochs)]
        epochs = [
            {
                "epoch": epoch,
                "loss": 2.0,
                "train_top1": (0.65 + 0.02 * trial) * rise + rng.normal(0, 0.003),
                "holdout_top1": (0.72 + 0.01 * trial) * rise + rng.normal(0, 0.003),
            }
            for epoch, rise in enumerate(rises)
        ]
        recipe = {"learning_rate": rate, "weight_decay": 3e-5}
        trials.append({"trial": trial, "recipe": recipe, "stopped": trial == 1, "epochs": epochs})
    result = entry(winner) | {"val_top1": 0.7402, "num_val_images": 50_000, "seconds": 30_000.0}
    result |= {"recipe": trials[2]["recipe"], "costs": winner.costs}
    rows = [
        {
            "op_name": f"conv{index}",
            "inp_size": 112,
            "kernel_size": 3,
            "cin": 16,
            "cout": 64,
            "params": 9216,
            "mults": 28_901_376,
            "adds": 28_700_672,
            "macs": 28_901_376,
        }
        for index in range(30)
    ]
    totals = {key: sum(row[key] for row in rows) for key in ("params", "mults", "adds", "macs")}
    micronet = [
        {"precision": "float32", "params": 3.652e6, "ops": 587.9e6, "score": 1.0318, "note": ""},
        {"precision": "float16", "params": 1.826e6, "ops": 438.1e6, "score": 0.639, "note": "<16>"},
    ]
    profile = {"rows": rows, "totals": totals, "micronet": micronet}
    storage.write_json(f"{run_dir}/retrain/0/result.json", result)
    storage.write_json(f"{run_dir}/retrain/0/curves.json", trials)
    storage.write_json(f"{run_dir}/retrain/0/profile.json", profile)


def write_export(run_dir: str) -> None:
    export = {"file": "/somewhere/else/0.onnx", "bytes": 14_300_000, "max_abs_diff": 2.4e-6}
    export |= {"num_images": 64, "top1_agreement": 1.0, "opset": 20}
    export["input"] = {"preprocessing": "Scale the short side to 256 pixels."}
    storage.write_json(f"{run_dir}/export/0.json", export)


def write_predictions(run_dir: str, classes: Sequence[str] = ("daisy", "rose", "tulip")) -> None:
    """300 images of the first class and 10 of each other; of the latter, half are wrong."""
    sizes = [300, *[10] * (len(classes) - 1)]
    labels = np.repeat(np.arange(len(classes)), sizes)
    predicted = labels.copy()
    predicted[300::2] = 0
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(jpeg, "JPEG")
    Predictions(
        classes=tuple(classes),
        names=[f"val/{row}.jpg" for row in range(len(labels))],
        labels=labels,
        predicted=predicted,
        probability=np.linspace(0.4, 0.99, len(labels), dtype=np.float32),
        thumbnails=[jpeg.getvalue() if row in (316, 318) else None for row in range(len(labels))],
    ).write(f"{run_dir}/retrain/0/validation.parquet")


def write_run(run_dir: str) -> None:
    write_job(run_dir)
    write_training(run_dir)
    winner = write_search(run_dir)
    write_retraining(run_dir, winner)
    write_predictions(run_dir)
    write_export(run_dir)


class Tags(HTMLParser):
    """Collects tags with their attributes, and sees to it that they nest."""

    EMPTY = ("meta", "input", "br", "img", "line", "rect")  # without an end tag here

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def names(self) -> list[str]:
        return [tag for tag, _ in self.tags]

    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]


def read_page(run_dir) -> str:
    """Build the report; return its page without the code of plotly.js."""
    page = storage.read(build_report(str(run_dir))).decode()
    start = page.find("<script>/**\n* plotly.js")
    if start < 0:
        return page
    return page[:start] + page[page.index("</script>", start) + len("</script>") :]


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "flowers-330M"
    write_run(str(folder))
    return folder


def test_a_whole_run_shows_every_part_and_starts_with_the_numbers(run_dir):
    page = read_page(run_dir)
    assert headings(page) == [
        "Search",
        "Fitness by generation",
        "The winner",
        "Winner against random architectures",
        "Pareto front",
        "Best architectures",
        "Supernet training",
        "Retraining",
        "Validation images, network 0",
        "Cost profile",
        "Export",
    ]
    tags = Tags(page)
    text = " ".join(tags.text)
    assert text.index("flowers-330M") < text.index("74.02 %") < text.index("Fitness by generation")
    assert "export/0.onnx" in text and "/somewhere/else" not in text
    for shown in (
        "360",
        "50,000 validation images",
        "float16",
        "short side to 256 pixels",
        "conv29",
        "10 of 10",
        "seed 7",
    ):
        assert shown in text
    figures_shown = ["search-plot", "generations-plot", "baseline-plot", "training-plot"]
    assert set(tags.ids()) >= {*figures_shown, "retraining-plot-0", "confusion-plot-0"}


def test_a_search_on_scaled_crops_says_why_its_top1_is_another(tmp_path):
    winner = write_search(str(tmp_path))
    write_retraining(str(tmp_path), winner)
    search = storage.read_json(f"{tmp_path}/search.json")
    assert "scales crops" not in read_page(tmp_path)
    search["baseline"] |= {"resolution": 64, "scaled_from": 128}
    storage.write_json(f"{tmp_path}/search.json", search)
    assert "scales crops of 128 pixels to the 64" in read_page(tmp_path)


def test_what_an_import_found_in_the_images_is_shown(run_dir: str):
    found = {"facts": ["2,000 images in train"], "problems": ["3 pictures lie in both <splits>"]}
    storage.write_json(f"{run_dir}/data_check.json", found)
    page = read_page(run_dir)
    assert "2,000 images in train" in page and "3 pictures lie in both &lt;splits&gt;" in page


def test_each_class_its_confusions_and_the_worst_images_are_shown(run_dir):
    page = read_page(run_dir)
    assert rows_of(page, "Validation images, network 0")[1:4] == [
        ["rose", "50.00 % ± 15.81", "10", "daisy (5)"],
        ["tulip", "50.00 % ± 15.81", "10", "daisy (5)"],
        ["daisy", "100.00 %", "300", ""],
    ]
    text = " ".join(" ".join(Tags(page).text).split())
    assert "Top-1 96.88 % ± 0.97; balanced, which is the mean over the classes, 66.67 % ±" in text
    assert "daisy 98.82 % is tulip val/318.jpg" in text  # the one that it is most sure of
    assert text.index("val/318.jpg") < text.index("val/316.jpg")


@pytest.mark.parametrize(
    "fitness, title, unit, scale",
    [("balanced", "balanced top-1", "%", 100), ("log_likelihood", "log-likelihood", "nats", 1)],
)
def test_a_search_by_another_fitness_says_so(tmp_path, fitness, title, unit, scale):
    write_job(str(tmp_path))
    write_search(str(tmp_path))
    job = storage.read_json(str(tmp_path / "job.json"))
    job["job"]["search"] = job["job"].get("search", {}) | {"fitness": fitness}
    storage.write_json(str(tmp_path / "job.json"), job)
    page = read_page(tmp_path)
    assert f"{title} on the hold-out images, {unit}" in page
    front = rows_of(page, "Pareto front")
    assert front[0][0] == title
    best = storage.read_json(str(tmp_path / "front.json"))[0]["fitness"]
    assert front[1][0] == f"{scale * best:.2f} {unit}"


def test_confusions_are_shares_of_all_images_of_a_class_shown_with_it_or_not():
    figure = figures.confusion_figure(np.array([[3, 1], [0, 2]]), np.array([8, 2]), ["a", "<b>"])
    assert list(map(list, figure.data[0].z)) == [[37.5, 12.5], [0, 100]]
    assert figure.data[0].text[0][1] == "a as &lt;b&gt;: 1"


def test_of_many_classes_the_figure_shows_the_most_confused(tmp_path):
    write_retraining(str(tmp_path), make_candidate(np.random.default_rng(0), 0))
    write_predictions(str(tmp_path), [f"<b>{label}" for label in range(1000)])
    page = read_page(tmp_path)
    assert "b>0" not in Tags(page).names()
    assert len(rows_of(page, "Validation images, network 0")) == 1001
    assert "The figure shows the 40 classes with the most confusions" in page
    assert len(page) < 1_000_000


def test_the_page_names_no_other_place(run_dir):
    page = read_page(run_dir)
    text = re.sub('base64,[^"]*', "", page.replace("s3://images", ""))
    assert re.findall(r"(?:https?:)?//[\w.]+", text) == []
    for tag, attributes in Tags(page).tags:
        inside = attributes.pop("src", "").startswith("data:image/jpeg;base64,")
        assert inside == (tag == "img") and "href" not in attributes, (tag, attributes)
    assert "default-src 'none'" in page


def test_plotly_is_inside_once_and_only_where_a_figure_needs_it(run_dir, tmp_path):
    page = storage.read(build_report(str(run_dir))).decode()
    assert page.count("* plotly.js v") == 1
    write_export(str(tmp_path))
    assert "plotly.js" not in storage.read(build_report(str(tmp_path))).decode()


def test_the_same_run_gives_the_same_page(run_dir):
    assert read_page(run_dir) == read_page(run_dir)


@pytest.mark.parametrize(
    ("write", "parts"),
    [
        (write_training, ["Supernet training"]),
        (write_export, ["Export"]),
        (
            lambda folder: write_retraining(folder, make_candidate(np.random.default_rng(0), 0)),
            ["The winner", "Retraining", "Cost profile"],
        ),
    ],
)
def test_a_run_that_has_one_part_shows_that_part(write, parts, tmp_path):
    write(str(tmp_path))
    page = read_page(tmp_path)
    Tags(page)
    assert headings(page) == parts


def write_shipped(run_dir: str) -> None:
    """Two networks with the supernet's weights; the first fine-tuned and from scratch, too."""
    rng = np.random.default_rng(3)
    networks = [entry(make_candidate(rng, 0)) for _ in range(2)]
    answers = [
        {"limit": {"cost": "macs", "max": limit, "min": None}, **network}
        for limit, network in ((200e6, networks[0]), (300e6, networks[1]), (400e6, networks[1]))
    ]
    search = {"num_evaluations": 60, "seconds": 9.0, "limits": [], "winner": networks[0]}
    storage.write_json(f"{run_dir}/search.json", search | {"answers": answers})
    for name, way, top1 in (
        ("0", "supernet", 0.64),
        ("1", "supernet", 0.5),
        ("0-fine-tuned", "fine-tuned", 0.8),
        ("0-scratch", "scratch", 0.36),
    ):
        number = int(name[0])
        result = networks[number] | {"shipped": way, "val_top1": top1, "num_val_images": 2500}
        result["supernet_top1"] = (0.64, 0.5)[number]
        storage.write_json(f"{run_dir}/retrain/{name}/result.json", result)
        profile = {"rows": [], "totals": {}, "micronet": []}
        storage.write_json(f"{run_dir}/retrain/{name}/profile.json", profile)


def rows_of(page: str, title: str) -> list[list[str]]:
    """The cells of the first table of a section."""
    table = page[page.index(f"<h2>{title}</h2>") :].split("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    return [[unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows]


def test_ways_to_get_weights_stand_side_by_side(tmp_path):
    write_shipped(str(tmp_path))
    page = read_page(tmp_path)
    header, first, second = rows_of(page, "Shipped networks")
    assert header[:6] == [
        *("network", "limit", "supernet's weights", "fine-tuned", "from scratch"),
        "validation images",
    ]
    assert first[:6] == [
        *("0", "MACs ≤ 200.0 M", "64.00 % ± 0.96", "80.00 % ± 0.80", "36.00 % ± 0.96"),
        "2,500",
    ]
    assert second[:6] == ["1", "MACs ≤ 300.0 M, MACs ≤ 400.0 M", "50.00 % ± 1.00", "", "", "2,500"]
    profiles = page[page.index("<h2>Cost profile</h2>") :]
    assert re.findall(r"<h3>Network (.*?)</h3>", profiles) == ["0", "1"]
    assert "winner, supernet's weights; 2,500 validation images" in unescape(page)


def test_what_the_supernet_reached_is_beside_what_was_trained_from_scratch(tmp_path):
    write_retraining(str(tmp_path), make_candidate(np.random.default_rng(0), 0))
    path = f"{tmp_path}/retrain/0/result.json"
    header, row = rows_of(read_page(tmp_path), "Retraining")
    assert header[:3] == ["network", "from scratch", "validation images"]
    assert row[:3] == ["0", "74.02 % ± 0.20", "50,000"]
    storage.write_json(path, storage.read_json(path) | {"supernet_top1": 0.5})
    header, row = rows_of(read_page(tmp_path), "Retraining")
    assert header[:3] == ["network", "supernet's weights", "from scratch"]
    assert row[:3] == ["0", "50.00 % ± 0.22", "74.02 % ± 0.20"]


def test_a_search_still_running_shows_its_generations(tmp_path):
    rng = np.random.default_rng(0)
    History(str(tmp_path / "history")).append([make_candidate(rng, 0) for _ in range(5)])
    page = read_page(tmp_path)
    assert headings(page) == ["Search", "Fitness by generation"]
    assert "<b>5</b><span>evaluations</span>" in page


def test_a_candidate_that_failed_is_counted_and_not_drawn(tmp_path):
    rng = np.random.default_rng(0)
    good, bad = make_candidate(rng, 0), make_candidate(rng, 0)
    bad = Candidate(arch=bad.arch, fitness=-math.inf, costs=bad.costs)
    History(str(tmp_path / "history")).append([good, bad])
    page = read_page(tmp_path)
    assert "1 could not be evaluated" in page
    assert scatter_of(page)["data"][2]["y"] == [100 * good.fitness]


def test_what_early_stopping_saved_is_shown(tmp_path):
    rng = np.random.default_rng(0)
    evaluated = [replace(make_candidate(rng, 0), images=images) for images in (100, 100, 20)]
    History(str(tmp_path / "history")).append(evaluated)
    page = read_page(tmp_path)
    assert "Early stopping ended 1 of 3 evaluations, which are not shown" in page
    assert "220 images were evaluated instead of 300." in page
    assert len(scatter_of(page)["data"][2]["y"]) == 2


def scatter_of(page: str) -> dict:
    """What the page hands plotly for the scatter of the search: data, layout and frames."""
    start = page.index("Plotly.newPlot(", page.index('<div id="search-plot"'))
    decoder, found = json.JSONDecoder(), []
    for opening in ("[", "{"):
        start = page.index(opening, start)
        value, length = decoder.raw_decode(page[start:])
        found.append(value)
        start += length
    frames = page.index("[", page.index("addFrames(", start))
    return {"data": found[0], "layout": found[1], "frames": decoder.raw_decode(page[frames:])[0]}


def points(trace: dict) -> list[tuple[float, float]]:
    return list(zip(trace["x"], trace["y"], strict=True))


def test_the_scatter_holds_every_candidate_and_the_front_after_each_generation(run_dir):
    scatter = scatter_of(read_page(run_dir))
    candidates = History(str(run_dir / "history")).candidates
    [slider], [player, costs] = scatter["layout"]["sliders"], scatter["layout"]["updatemenus"]
    assert [button["label"] for button in player["buttons"]] == ["Play", "Pause"]
    assert [b["label"] for b in costs["buttons"]] == ["MACs", "Parameters", "MicroNet score"]
    names = [step["label"] for step in slider["steps"]]
    assert names == [frame["name"] for frame in scatter["frames"]]
    assert names == [str(generation) for generation in range(NUM_GENERATIONS)]
    for index, cost in enumerate(("macs", "params", "micronet_score")):
        at = [(candidate.costs[cost], 100 * candidate.fitness) for candidate in candidates]
        shown, front, winners = scatter["data"][2 + 3 * index : 5 + 3 * index]
        assert points(shown) == at
        assert shown["marker"]["color"] == [candidate.generation for candidate in candidates]
        assert points(winners) == [at[candidates.index(best_first(candidates)[0])]]
        for generation, frame in enumerate(scatter["frames"]):
            colours, so_far = frame["data"][2 * index : 2 * index + 2]
            assert frame["traces"][2 * index : 2 * index + 2] == [2 + 3 * index, 3 + 3 * index]
            assert colours["marker"] == {"cmin": generation - 1, "cmax": generation + 1}
            expected = pareto_front(candidates[: POPULATION_SIZE * (generation + 1)], cost)
            assert points(so_far) == [(c.costs[cost], 100 * c.fitness) for c in expected]
        assert points(front) == points(so_far)
        data, axis = costs["buttons"][index]["args"]
        visible = [n for n, is_visible in enumerate(data["visible"]) if is_visible]
        assert visible == [0, 1, *range(2 + 3 * index, 5 + 3 * index)]
        assert [line["x0"] for line in axis["shapes"]] == ([MAX_MACS] if cost == "macs" else [])
    assert [trace["visible"] for trace in scatter["data"]] == [True] * 5 + [False] * 6


def test_hover_text_spells_blocks_and_channels_apart(run_dir):
    trace = scatter_of(read_page(run_dir))["data"][2]
    candidate = History(str(run_dir / "history")).candidates[-1]
    text, generation = trace["customdata"][-1]
    block, channel = text.replace(" ", "").split("<br>")
    assert block == "block" + "".join(map(str, candidate.arch[0::2]))
    assert channel == "channel" + "".join(map(str, candidate.arch[1::2]))
    assert generation == candidate.generation


def test_the_drawing_has_a_bar_as_high_as_the_scale_of_each_block():
    scales = [0, 9] * 10
    drawing = architecture_svg({"arch": {"block": [0, 3] * 10, "channel": scales}})
    heights = [float(height) for height in re.findall(r'<rect.*? height="([\d.]+)"', drawing)]
    assert len(heights) == 20
    assert np.allclose(np.array(heights) / heights[0], np.array(scales) + 1)
    assert re.findall(r"stage \d", drawing) == ["stage 1", "stage 2", "stage 3", "stage 4"]
    assert "block 19: xception 3&times;3, scale 2.0" in drawing


@pytest.mark.parametrize(
    "arch", [{"depth": [2, 3]}, {"block": [0, 7], "channel": [1, 1]}, {"block": [], "channel": []}]
)
def test_an_architecture_of_another_space_is_drawn_gene_by_gene(arch):
    drawing = architecture_svg({"arch": arch, "genes": [2, 3, 12]})
    assert "gene 2: choice 12" in drawing
    assert drawing.count("<rect") == 3


def test_strings_of_files_are_escaped(run_dir, tmp_path):
    evil = "</script><img src=x onerror=alert(1)>"
    folder = tmp_path / "a<b>run"
    write_run(str(folder))

    def poison(value):
        if isinstance(value, dict):
            return {key: poison(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [poison(entry) for entry in value]
        return evil if isinstance(value, str) else value

    for file in folder.rglob("*.json"):
        storage.write_json(str(file), poison(storage.read_json(str(file))))
    curves = storage.read_json(str(folder / "retrain/0/curves.json"))
    for curve in curves:
        curve["recipe"] = {evil: curve["trial"]}
    storage.write_json(str(folder / "retrain/0/curves.json"), curves)
    result = storage.read_json(str(folder / "retrain/0/result.json")) | {"recipe": {evil: 1}}
    storage.write_json(str(folder / "retrain/0/result.json"), result)
    search = storage.read_json(str(folder / "search.json"))
    search["winner"]["arch"] = {evil: [1]}
    storage.write_json(str(folder / "search.json"), search)
    candidate = Candidate(arch=(0,) * 40, fitness=0.5, costs={evil: 1.0})
    storage.remove(str(folder / "history"))
    History(str(folder / "history")).append([candidate])

    tags = Tags(read_page(folder))
    assert "b>run" not in tags.names()
    assert all("onerror" not in attributes for _, attributes in tags.tags)
    assert evil in "".join(tags.text)
    assert "a<b>run" in "".join(tags.text)


def test_a_class_name_with_a_tag_stays_text(tmp_path):
    write_job(str(tmp_path))
    job = storage.read_json(str(tmp_path / "job.json"))
    job["job"]["data"]["classes"] = ["<script>alert(1)</script>"]
    storage.write_json(str(tmp_path / "job.json"), job)
    write_export(str(tmp_path))
    page = read_page(tmp_path)
    assert "<script>" not in page
    assert "<script>alert(1)</script>" in "".join(Tags(page).text)


def test_names_in_a_figure_are_escaped_for_plotly_which_reads_them_as_html():
    trials = [
        {"trial": index, "recipe": {"<a>": index}, "stopped": False, "epochs": []}
        for index in range(2)
    ]
    assert "<" not in figures.retraining_figure(trials).data[0].name


@pytest.mark.parametrize(
    "name", ["job.json", "curves/supernet.json", "front.json", "retrain/0/result.json"]
)
@pytest.mark.parametrize("content", [b'[{"epoch": 1, "lo', b"\xff\xfe", b'{"a": 1}', b"[3]"])
def test_a_file_that_is_not_what_it_should_be_is_named(name, content, tmp_path):
    storage.write(str(tmp_path / name), content)
    with pytest.raises(UserError, match=name) as caught:
        build_report(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_empty_run_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing to report yet"):
        build_report(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_may_be_a_uri(tmp_path):
    write_training(str(tmp_path))
    assert build_report(tmp_path.as_uri()) == f"{tmp_path.as_uri()}/report.html"
    assert (tmp_path / "report.html").exists()


def test_how_far_a_ranking_can_be_trusted_is_shown(tmp_path: Path):
    run_dir = str(tmp_path)
    write_search(run_dir)
    one = {"num_candidates": 60, "num_images": 500, "num_left_out": 7, "split_half": 0.43}
    one |= {"limit": None, "standard_error": 0.02, "chance_random": 0.9, "num_equal": 5}
    one |= {"chances": [0.5, 0.55, 0.8, 0.95]}
    one |= {"comparisons": [{"with": "second", "chance": 0.55}, {"with": "tenth", "chance": 0.8}]}
    limit = {"cost": "macs", "max": 3e8, "min": None}
    rankings = [one, one | {"limit": limit, "split_half": 0.71}, None]  # None: too few candidates
    search = storage.read_json(f"{run_dir}/search.json")
    storage.write_json(f"{run_dir}/search.json", search | {"reliability": rankings})
    rankers = {"kendall_tau": [0.41, 0.32, 0.52], "regret": [1.5, None, None]}
    rank = {"truth": "t.csv", "num_archs": 3, "rankers": {"macs": rankers}, "num_failed": 2}
    rank |= {"pick": {"regret": 2.5, "num_known": 7}, "beyond_macs": [0.1, -0.2, 0.3]}
    rank |= {"true": [90.0, 91.0, 92.0], "supernet": [0.5, 0.6, 0.7]}
    storage.write_json(f"{run_dir}/rank.json", rank)
    build_report(run_dir)
    page = unescape(Path(run_dir, "report.html").read_text())
    for text in ("0.43", "0.71", "MACs ≤ 300.0 M", "7 candidates whose evaluation was stopped"):
        assert text in page
    assert "reliability-plot" in page and "rank-plot" in page
    assert "0.410 [0.320, 0.520]" in page and "<td>1.500</td>" in page
    assert "2.5 below the best known of 7 within its limits." in page
    assert "minus that of MACs: 0.100 [-0.200, 0.300]. 2 more could not be evaluated" in page

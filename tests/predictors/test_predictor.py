"""The accuracy predictor: published numbers, the quick way against the plain one, fitting."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from nasray.costs.latency import LatencyTable
from nasray.errors import UserError
from nasray.predictors.predictor import FORMAT, AccuracyPredictor
from nasray.predictors.quality import kendall_tau, quality_of_fit
from nasray.spaces import SPACES, space_class
from nasray.spaces.active import Activity
from nasray.spaces.ofa_mobilenetv3 import OfaMobileNetV3
from nasray.spaces.ofa_proxyless import OfaProxyless
from nasray.spaces.ofa_resnet50d import OfaResNet50D
from nasray.spaces.population import random_population
from nasray.spaces.tiny import Tiny

OFA = Path(__file__).parents[3] / "shared" / "data" / "ofa"
published = pytest.mark.skipif(not OFA.exists(), reason=f"published predictors are not at {OFA}")
every_space = pytest.mark.parametrize("space", [space_class(name)() for name in SPACES], ids=SPACES)


def random_predictor(space, seed=0):
    generator = torch.Generator().manual_seed(seed)
    widths = [sum(len(gene.choices) for gene in space.genes), 12, 16, 8, 1]
    return AccuracyPredictor(
        space,
        [
            (torch.randn(n, m, generator=generator) / 4, torch.randn(n, generator=generator))
            for m, n in zip(widths, widths[1:], strict=False)
        ],
    )


def population_of(space, size=300, seed=0):
    return random_population(space.genes, size, np.random.default_rng(seed))


@published
def test_printed_architectures_have_both_their_printed_numbers():
    space = OfaMobileNetV3()
    predictor = AccuracyPredictor.load(str(OFA / "acc_predictor.pth"), space)
    latency = LatencyTable.load(str(OFA / "note10"), space)
    entries = json.loads((OFA / "printed_archs.json").read_text())["entries"]
    assert len(entries) == 6
    for entry in entries:
        arch = space.from_json({key: entry[key] for key in ("ks", "e", "d", "r")})
        population = np.array([arch], dtype=np.int8)
        assert round(100 * float(predictor(population)[0]), 2) == entry["printed_acc"]
        assert predictor.exact(population)[0] == pytest.approx(entry["accuracy"], abs=6e-8)
        assert round(float(latency(population)[0]), 2) == entry["printed_ms"]


@published
def test_the_published_resnet_predictor_ends_at_its_plateau():
    space = OfaResNet50D()
    predictor = AccuracyPredictor.load(str(OFA / "ofa_resnet50_acc_predictor.pth"), space)
    ends = np.array([space.named["largest"], space.named["smallest"]], dtype=np.int8)
    large, small = predictor.exact(ends)
    assert large == pytest.approx(0.829870, abs=5e-7)
    assert small < 0.76


@published
@pytest.mark.parametrize(
    ("name", "space"),
    [
        ("acc_predictor.pth", OfaProxyless()),
        ("acc_predictor.pth", OfaMobileNetV3(width=1.0)),
        ("ofa_resnet50_acc_predictor.pth", OfaMobileNetV3()),
    ],
)
def test_a_published_predictor_of_another_space_is_refused(name, space):
    with pytest.raises(UserError, match=f"{name} is a predictor of the space ofa_.*, not of"):
        AccuracyPredictor.load(str(OFA / name), space)


@published
def test_a_resolution_that_a_published_predictor_does_not_know_is_named():
    space = OfaMobileNetV3(resolutions=(160, 164))
    with pytest.raises(UserError, match=r"knows no resolutions \[164\]"):
        AccuracyPredictor.load(str(OFA / "acc_predictor.pth"), space)


@every_space
def test_the_quick_way_predicts_what_the_plain_one_does(space):
    predictor, population = random_predictor(space), population_of(space)
    plain = predictor.exact(population)
    assert plain.std() > 0.01
    np.testing.assert_allclose(predictor(population), plain, atol=2e-5)


def test_more_architectures_than_fit_into_one_chunk_keep_their_order(monkeypatch):
    predictor, population = random_predictor(Tiny()), population_of(Tiny())
    at_once = predictor(population)
    monkeypatch.setattr("nasray.predictors.predictor.CHUNK", 7)
    np.testing.assert_allclose(predictor(population), at_once, atol=1e-6)


def test_a_prediction_begins_before_anybody_waits_for_it(monkeypatch):
    predictor, population = random_predictor(Tiny()), population_of(Tiny())
    begun, predict = threading.Event(), predictor._predict

    def seen(chunk):
        begun.set()
        return predict(chunk)

    monkeypatch.setattr(predictor, "_predict", seen)
    awaited = predictor.begin(population)
    assert begun.wait(timeout=30)
    np.testing.assert_array_equal(awaited(), predictor(population))


def test_predicting_leaves_torchs_number_of_threads_alone():
    before = torch.get_num_threads()
    random_predictor(Tiny())(population_of(Tiny()))
    started_later = []
    thread = threading.Thread(target=lambda: started_later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *started_later] == [before, before]


@every_space
def test_genes_without_effect_do_not_count(space):
    predictor, population = random_predictor(space), population_of(space)
    canonical = space.canonical(population)
    if space.name.startswith("ofa"):
        assert (canonical != population).any()
    np.testing.assert_array_equal(predictor.exact(population), predictor.exact(canonical))
    np.testing.assert_array_equal(predictor(population), predictor(canonical))


def test_a_gene_has_an_effect_exactly_where_its_block_is_there():
    space = OfaMobileNetV3()
    population = population_of(space, 40)
    active = Activity(space)(population)
    for arch, found in zip(population.tolist(), active, strict=True):
        for block in range(20):
            there = block % 4 < 2 + arch[40 + block // 4]
            assert found[block] == found[20 + block] == there
        assert found[40:].all()


def test_fitting_finds_what_the_genes_are_worth():
    space = Tiny()
    population = np.unique(population_of(space, 400), axis=0)
    worth = np.random.default_rng(1).random(population.shape[1])
    top1 = 0.5 + 0.02 * (population @ worth)
    steps = []
    quality = quality_of_fit(
        space, population, top1, seed=0, steps=300, show=lambda done, text: steps.append(done)
    )
    assert steps == list(range(1, 301))
    assert quality["kendall_tau"] > 0.9
    assert quality["rmse"] < 0.2 * top1.std()
    assert quality["num_held_out"] == len(quality["measured"]) == len(quality["predicted"])
    assert quality["num_held_out"] == round(0.2 * len(population))
    assert set(np.float32(quality["measured"])) <= set(np.float32(top1))
    json.dumps(quality)
    predictor = AccuracyPredictor.fit(space, population, top1, seed=0, steps=300)
    np.testing.assert_allclose(predictor(population), top1, atol=0.03)


def test_a_fit_leaves_nothing_out_and_nothing_changed_when_it_is_interrupted():
    space = Tiny()
    population = np.unique(population_of(space, 5), axis=0)
    odd = np.arange(len(population)) / 100  # each has its own, which nothing else tells
    predictor = AccuracyPredictor.fit(space, population, odd, seed=0, steps=500)
    np.testing.assert_allclose(predictor(population), odd, atol=0.002)

    def interrupt(done: int, text: str) -> None:
        raise KeyboardInterrupt

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            AccuracyPredictor.fit(space, population, odd, seed=0, show=interrupt)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_same_seed_same_fit():
    space = Tiny()
    population = population_of(space, 50)
    top1 = 0.5 + 0.1 * np.random.default_rng(0).random(50)
    fits = [
        quality_of_fit(space, population, top1, seed=seed, steps=5)["predicted"]
        for seed in (0, 0, 1)
    ]
    assert fits[0] == fits[1] != fits[2]


def test_what_is_saved_is_loaded_and_only_for_its_own_space(tmp_path):
    predictor, path = random_predictor(OfaMobileNetV3()), str(tmp_path / "predictor.pt")
    predictor.save(path)
    population = population_of(predictor.space)
    loaded = AccuracyPredictor.load(path, OfaMobileNetV3())
    np.testing.assert_array_equal(loaded(population), predictor(population))
    with pytest.raises(UserError, match="fitted to ofa_mobilenetv3 with width = 1.2, not 1.0"):
        AccuracyPredictor.load(path, OfaMobileNetV3(width=1.0))
    with pytest.raises(UserError, match="with name = 'ofa_mobilenetv3', not 'tiny'"):
        AccuracyPredictor.load(path, Tiny())


def test_files_that_hold_no_predictor_are_named(tmp_path):
    path = tmp_path / "predictor.pt"
    with pytest.raises(UserError, match=r"predictor.pt does not exist"):
        AccuracyPredictor.load(str(path), Tiny())
    path.write_bytes(b"no predictor at all")
    with pytest.raises(UserError, match=r"predictor.pt is not a readable predictor"):
        AccuracyPredictor.load(str(path), Tiny())
    path.write_text("a,b\n1,2")
    with pytest.raises(UserError, match=r"predictor.pt is not a readable predictor"):
        AccuracyPredictor.load(str(path), Tiny())
    torch.save({"state": {}}, path)
    with pytest.raises(UserError, match=r"predictor.pt holds no accuracy predictor"):
        AccuracyPredictor.load(str(path), Tiny())
    torch.save({"format": FORMAT}, path)
    with pytest.raises(UserError, match=r"predictor.pt is a damaged predictor"):
        AccuracyPredictor.load(str(path), Tiny())
    shapes = {"0.weight": (9, 124), "0.bias": (9,), "2.weight": (9, 9), "2.bias": (9,)}
    shapes |= {"4.weight": (9, 9), "4.bias": (9,), "6.weight": (1, 9), "6.bias": (1,)}
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    with pytest.raises(UserError, match="is a damaged predictor"):
        AccuracyPredictor.load(str(path), OfaMobileNetV3())


@pytest.mark.parametrize("damage", ["nan", "shape", "short", "text", "space"])
def test_a_damaged_predictor_is_refused(tmp_path, damage):
    path = tmp_path / "predictor.pt"
    random_predictor(Tiny()).save(str(path))
    content = torch.load(path, weights_only=True)
    if damage == "nan":
        content["layers"][1][0][0, 0] = float("nan")
    elif damage == "shape":
        content["layers"][1][0] = torch.zeros(3, 3)
    elif damage == "short":
        content["layers"].pop()
    elif damage == "text":
        content["layers"] = "layers"
    else:
        content["space"] = "tiny"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"predictor.pt is a damaged predictor"):
        AccuracyPredictor.load(str(path), Tiny())


def test_a_predictor_with_flipped_bits_is_refused_or_the_same(tmp_path):
    path = tmp_path / "predictor.pt"
    random_predictor(Tiny()).save(str(path))
    whole, population = path.read_bytes(), population_of(Tiny())
    right = AccuracyPredictor.load(str(path), Tiny())(population)
    refused = 0
    for place in np.random.default_rng(0).integers(len(whole), size=100).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            found = AccuracyPredictor.load(str(path), Tiny())(population)
        except UserError as error:
            assert str(error).startswith(str(path))
            refused += 1
        else:
            np.testing.assert_array_equal(found, right)
    assert refused > 50


@pytest.mark.parametrize(
    "odd",
    [
        lambda bias: bias[:, None],
        lambda bias: bias.to_sparse(),
        lambda bias: bias.to("meta"),
        lambda bias: bias.to(torch.complex64),
    ],
)
def test_a_predictor_of_odd_tensors_is_refused(tmp_path, odd):
    path = tmp_path / "predictor.pt"
    random_predictor(Tiny()).save(str(path))
    content = torch.load(path)
    content["layers"][0][1] = odd(content["layers"][0][1])
    torch.save(content, path)
    with pytest.raises(UserError, match=r"predictor.pt is a damaged predictor"):
        AccuracyPredictor.load(str(path), Tiny())


def test_a_fit_needs_one_top1_for_each_architecture():
    with pytest.raises(UserError, match="got 50 and 49"):
        quality_of_fit(Tiny(), population_of(Tiny(), 50), [0.5] * 49, seed=0)


def test_kendall_tau_is_that_of_the_textbook():
    first, second = np.array([1, 2, 3, 4]), np.array([1, 3, 2, 4])
    assert kendall_tau(first, second) == pytest.approx(4 / 6)
    assert kendall_tau(first, first) == 1
    assert kendall_tau(first, -first) == -1
    assert kendall_tau(first, np.zeros(4)) == 0
    # tau-b with ties, worked out by hand: 2 x 4 agreeing pairs over sqrt(12 x 10).
    assert kendall_tau(first, np.array([1, 1, 2, 3])) == pytest.approx(10 / (12 * 10) ** 0.5)

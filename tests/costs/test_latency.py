"""Latency tables: published ones, nasray's own, and the measuring of them."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import ray

from nasray.config import Limit
from nasray.costs.latency import LatencyTable, blocks_of
from nasray.costs.latency_check import check, compare
from nasray.costs.latency_cluster import measure_on_cluster
from nasray.costs.latency_files import block_key, read_lines, write_lines
from nasray.costs.latency_measure import (
    MIN_SAMPLES,
    doubts,
    measure,
    networks_with,
    wanted_blocks,
)
from nasray.costs.latency_timing import Setup, describe, time_blocks
from nasray.errors import InfeasibleError, UserError
from nasray.search.limits import Limits
from nasray.spaces.ofa_mobilenetv3 import OfaMobileNetV3
from nasray.spaces.population import as_architectures, as_population, random_population
from nasray.spaces.shufflenet import ShuffleNet
from nasray.spaces.tiny import Tiny
from nasray.storage import locks

OFA = Path(__file__).parents[3] / "shared" / "data" / "ofa"
needs_ofa = pytest.mark.skipif(not OFA.exists(), reason=f"{OFA} is not here")

TINY = Tiny(resolution=16)
SMALL = OfaMobileNetV3(num_classes=10, resolution=64, resolutions=(32, 48, 64), width=0.5)
# More entries than 16 bits can number.
MANY = dataclasses.replace(SMALL, resolution=460, resolutions=tuple(range(64, 464, 4)))

# Smallest and largest network, ms (docs/spec.md, OFA 4.2).
NOTE10_BOUNDS = {
    160: (9.890, 47.773),
    176: (11.721, 58.038),
    192: (13.325, 67.562),
    208: (15.834, 81.192),
    224: (17.769, 92.398),
}
# Share of uniformly random networks within so many ms (docs/spec.md, OFA 4.2).
NOTE10_SHARES = {15: 0.0015, 20: 0.061, 25: 0.255, 30: 0.472, 40: 0.819, 50: 0.975, 60: 0.999}


def latency_of(key: str) -> float:
    """A made-up latency of the block `key`, ms."""
    return 0.01 + sum(map(ord, key)) % 977 / 100


def make_table(path: Path, space, changes: dict[str, str] | None = None) -> str:
    """Write a table of made-up latencies."""
    provenance = {"space": space.name, "device": "toaster"} | (changes or {})
    keys = sorted({block_key(block) for block in blocks_of(space)})
    lines = [{"block": key, "ms": str(latency_of(key)), **provenance} for key in keys]
    write_lines(str(path), lines)
    return str(path)


def measure_quickly(space, path, monkeypatch, **options) -> None:
    """Measure every block once."""
    with monkeypatch.context() as patch:
        for name in ("MIN_SAMPLES", "MAX_SAMPLES"):
            patch.setattr(f"nasray.costs.latency_measure.{name}", 1)
        measure(space, str(path), **options)


def edit(path: str, change) -> None:
    """Rewrite a table with change(lines) in place of its lines."""
    write_lines(path, change(read_lines(path)))


@needs_ofa
def test_published_tables_give_the_printed_latencies():
    space = OfaMobileNetV3()
    table = LatencyTable.load(str(OFA / "note10"), space)
    assert table.provenance["device"] == "note10"
    for entry in json.loads((OFA / "printed_archs.json").read_text())["entries"]:
        arch = space.from_json({key: entry[key] for key in ("ks", "e", "d", "r")})
        found = table(as_population([arch])).item()
        assert found == pytest.approx(entry["latency_ms"], abs=1e-6)
        assert round(found, 2) == pytest.approx(entry["printed_ms"])


@needs_ofa
def test_published_tables_have_the_known_bounds_and_shares():
    for side, bounds in NOTE10_BOUNDS.items():
        space = OfaMobileNetV3(resolutions=(side,))
        table = LatencyTable.load(str(OFA / "note10"), space)
        assert table.bounds() == pytest.approx(bounds, abs=6e-4)
        named = table(as_population([space.named["smallest"], space.named["largest"]]))
        assert named.tolist() == pytest.approx(bounds, abs=6e-4)
    space = OfaMobileNetV3()
    table = LatencyTable.load(str(OFA / "note10"), space)
    assert table.bounds() == pytest.approx((9.890, 92.398), abs=6e-4)
    found = table(random_population(space.genes, 20_000, np.random.default_rng(0)))
    assert np.median(found) == pytest.approx(30.7, abs=0.3)
    for limit, share in NOTE10_SHARES.items():
        assert np.mean(found <= limit) == pytest.approx(share, abs=0.012)


@needs_ofa
def test_what_a_published_folder_lacks_is_named(tmp_path):
    note10 = str(OFA / "note10")
    with pytest.raises(UserError, match="neither a .parquet or .csv file nor a folder of NNN"):
        LatencyTable.load(f"{note10}/224_lookup_table.yaml", OfaMobileNetV3())
    with pytest.raises(UserError, match=r"no table for the resolutions \[96, 225\]"):
        LatencyTable.load(note10, OfaMobileNetV3(resolution=225, resolutions=(96, 160, 225)))
    with pytest.raises(UserError, match="of the space ofa_mobilenetv3, not tiny"):
        LatencyTable.load(note10, TINY)
    with pytest.raises(UserError, match="no latency of stem at resolution 160.*more blocks"):
        LatencyTable.load(note10, OfaMobileNetV3(width=1.0))
    with pytest.raises(UserError, match=r"no latency of head at resolution 160, Head\(.*10\)"):
        LatencyTable.load(note10, OfaMobileNetV3(num_classes=10))
    text = (OFA / "note10" / "160_lookup_table.yaml").read_text()
    start = text.index("expanded_conv-input:40x40x32-output:20x20x48-expand:128-kernel:5")
    (tmp_path / "160_lookup_table.yaml").write_text(
        text[:start] + text[text.index("expanded", start + 1) :]
    )
    with pytest.raises(UserError, match="no latency of .* at resolution 160, .*kernel=5[^(]*;"):
        LatencyTable.load(str(tmp_path), OfaMobileNetV3(resolutions=(160,)))


@needs_ofa
def test_the_smallest_network_is_within_a_limit_of_its_own_latency():
    space = OfaMobileNetV3()
    table = LatencyTable.load(str(OFA / "note10"), space)
    own = float(table(as_population([space.named["smallest"]]))[0])
    limits = Limits(space, [Limit(cost="latency_ms", max=own)], table)
    assert limits.draw(1, np.random.default_rng(0), set()) == [space.named["smallest"]]
    with pytest.raises(
        InfeasibleError, match=r"max = 9\.89034651 is below .*, 9\.890346512078672; raise"
    ):
        Limits(space, [Limit(cost="latency_ms", max=9.89034651)], table)


@pytest.mark.parametrize(
    ("space", "ending"), [(TINY, "parquet"), (TINY, "csv"), (SMALL, "csv"), (MANY, "parquet")]
)
def test_sums_are_those_of_a_walk_over_the_blocks(tmp_path, space, ending):
    table = LatencyTable.load(make_table(tmp_path / f"t.{ending}", space), space)
    population = random_population(space.genes, 200, np.random.default_rng(0))
    walked = [
        sum(latency_of(block_key(block)) for block in space.decode(arch) if block is not None)
        for arch in as_architectures(population)
    ]
    np.testing.assert_allclose(table(population), walked)
    np.testing.assert_allclose(table(space.canonical(population)), walked)


def test_bounds_are_the_extremes_of_all_architectures(tmp_path):
    table = LatencyTable.load(make_table(tmp_path / "t.csv", TINY), TINY)
    every = np.array(list(np.ndindex(*(len(gene.choices) for gene in TINY.genes))), dtype=np.int8)
    assert table.bounds() == pytest.approx((table(every).min(), table(every).max()))


def test_bounds_respect_where_search_begins(tmp_path):
    space = ShuffleNet(num_classes=10, resolution=32, first_scale=9)  # one width is left
    table = LatencyTable.load(make_table(tmp_path / "t.parquet", space), space)
    low, high = table.bounds()
    found = table(random_population(space.genes, 500, np.random.default_rng(0)))
    assert low <= found.min() < found.max() <= high
    blocks = space.decode((0, 9) * 20)
    assert low <= sum(latency_of(block_key(block)) for block in blocks)
    every = LatencyTable.load(table.path, ShuffleNet(num_classes=10, resolution=32, first_scale=0))
    assert every.bounds()[0] < low and every.bounds()[1] > high


def test_a_block_that_a_table_lacks_is_named(tmp_path):
    path = make_table(tmp_path / "t.csv", SMALL)
    gone = block_key(SMALL.decode(SMALL.named["largest"])[6])
    edit(path, lambda lines: [line for line in lines if line["block"] != gone])
    with pytest.raises(UserError, match="no latency of .* at resolution 64, MBConv") as caught:
        LatencyTable.load(path, SMALL)
    assert gone in str(caught.value) and "\n" not in str(caught.value)


def test_tables_of_other_spaces_and_of_two_devices_are_refused(tmp_path):
    path = make_table(tmp_path / "t.csv", TINY)
    with pytest.raises(UserError, match="of the space tiny, not ofa_mobilenetv3"):
        LatencyTable.load(path, SMALL)
    edit(path, lambda lines: [*lines[:-1], lines[-1] | {"device": "kettle"}])
    with pytest.raises(UserError, match="mixes device 'toaster' and 'kettle'"):
        LatencyTable.load(path, TINY)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "is empty"),
        ("t.csv", b"block,ms\nx,1\n", "line 1 lacks .*space"),
        ("t.csv", b"space,device,block,ms\ntiny,d,x,fast\n", "'fast' ms"),
        ("t.csv", b"space,device,block,ms\ntiny,d,x,0\n", "above 0"),
        ("t.csv", b"space,device,block,ms\ntiny,d,x,nan\n", "above 0"),
        ("t.csv", b"space,device,block,ms\ntiny,d,x,1,2\n", "line 1 lacks"),
        ("t.csv", b"space,device,block,ms\ntiny,d\n", "line 1 lacks"),
        ("t.csv", b"space,device,block,ms\ntiny,d,x,1\ntiny,d,x,2\n", "has x more than once"),
        ("t.csv", b"space,device,block,ms,samples_ms\ntiny,d,x,1,1 oops\n", "x takes 'oops' ms"),
        ("t.csv", b"\xff\xfe\x00", "is no latency table"),
        ("t.parquet", b"", "is no latency table"),
        ("t.parquet", b"PAR1 and no more", "is no latency table"),
        ("160_lookup_table.yaml", b"a: 2026-13-45", "not readable YAML"),
        ("160_lookup_table.yaml", b"a: [", "not readable YAML"),
        ("160_lookup_table.yaml", b"\xff\x00", "not readable YAML"),
        ("160_lookup_table.yaml", b"a: b", "must map keys to"),
        ("160_lookup_table.yaml", b"[1, 2]", "must map keys to"),
        ("160_lookup_table.yaml", b"a: {mean: -1}", "above 0"),
        ("160_lookup_table.yaml", b"a: {mean: 1}", "no latency of stem"),
        ("other.txt", b"", "neither a .parquet or .csv file nor a folder"),
    ],
)
def test_a_damaged_table_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    table = name.endswith((".csv", ".parquet"))
    space = TINY if table else OfaMobileNetV3(resolutions=(160,))
    with pytest.raises(UserError, match=message) as caught:
        LatencyTable.load(str(tmp_path / name if table else tmp_path), space)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_table_that_is_absent_is_one_line(tmp_path):
    for name in ("t.csv", "t.parquet", "folder"):
        with pytest.raises(UserError, match=rf"{name}\b.*does not exist"):
            LatencyTable.load(str(tmp_path / name), TINY)


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_a_measured_table_covers_every_architecture(tmp_path, ending):
    path = str(tmp_path / f"t.{ending}")
    shown = []
    measure(TINY, path, show=lambda done, text: shown.append(done))
    assert shown == sorted(shown) and shown[-1] == len(wanted_blocks(TINY)) == len(read_lines(path))
    table = LatencyTable.load(path, TINY)
    assert table.provenance == describe(TINY, Setup())
    assert all(len(line["samples_ms"].split()) >= MIN_SAMPLES for line in read_lines(path))
    low, high = table.bounds()
    assert 0 < low < high


def test_only_what_is_missing_is_measured(tmp_path):
    path = str(tmp_path / "t.csv")
    measure(TINY, path)
    whole = {line["block"]: line for line in read_lines(path)}
    before = Path(path).stat().st_mtime_ns
    measure(TINY, path)
    assert Path(path).stat().st_mtime_ns == before  # nothing was missing: nothing written
    gone = sorted(whole)[0]
    edit(path, lambda lines: [line for line in lines if line["block"] != gone])
    measure(TINY, path)
    after = {line["block"]: line for line in read_lines(path)}
    assert after.keys() == whole.keys()
    assert len(after[gone]["samples_ms"].split()) >= MIN_SAMPLES
    assert all(after[key] == whole[key] for key in whole.keys() - {gone})


def test_an_interrupted_measurement_goes_on_where_it_was(tmp_path):
    path = str(tmp_path / "t.parquet")

    def interrupt(done: int, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(TINY, path, show=interrupt)
    first = {line["block"]: line["samples_ms"] for line in read_lines(path)}
    assert len(first) == len(TINY.gene_columns)  # one network
    with pytest.raises(UserError, match="no latency of"):
        LatencyTable.load(path, TINY)
    measure(TINY, path)
    after = {line["block"]: line["samples_ms"] for line in read_lines(path)}
    assert len(after) == len(wanted_blocks(TINY))
    assert all(after[key].startswith(samples) for key, samples in first.items())


def test_a_table_is_measured_by_one_process_at_a_time(tmp_path):
    path = str(tmp_path / "t.csv")
    with locks.held(f"{path}.in-use"):
        with pytest.raises(UserError, match=f"^{path}.in-use is in use by another nasray process"):
            measure(TINY, path)
    measure(TINY, path)
    assert [each.name for each in tmp_path.iterdir()] == ["t.csv"]


def test_a_table_with_flipped_bits_is_refused_or_the_same(tmp_path):
    path = Path(make_table(tmp_path / "t.parquet", TINY))
    whole, population = (
        path.read_bytes(),
        random_population(TINY.genes, 20, np.random.default_rng(0)),
    )
    right = LatencyTable.load(str(path), TINY)(population)
    rng, refused = np.random.default_rng(1), 0
    for place in rng.integers(len(whole), size=100).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            found = LatencyTable.load(str(path), TINY)(population)
        except UserError as error:
            assert str(error).startswith(str(path))
            refused += 1
        else:
            np.testing.assert_array_equal(found, right)
    assert refused > 20


def test_blocks_that_stay_unsure_are_counted(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)

    def disturbed(space, arch, setup, *, seed=0, place=None):
        keys = [block_key(block) for block in space.decode(arch) if block is not None]
        return [(key, float(rng.lognormal(sigma=1))) for key in keys]

    path = str(tmp_path / "t.csv")
    monkeypatch.setattr("nasray.costs.latency_measure.time_blocks", disturbed)
    measure(TINY, path)
    number = len(wanted_blocks(TINY))
    [warning] = doubts(path)
    assert warning.startswith(f"{path}: {number} of {number} blocks are known to ")
    alike = [line | {"samples_ms": "1.0 1.01 1.0 0.99 1.0"} for line in read_lines(path)]
    write_lines(path, alike)
    assert doubts(path) == []


def test_a_table_says_on_which_cores_and_with_which_governors_it_was_measured(
    tmp_path, monkeypatch
):
    core = sorted(os.sched_getaffinity(0))[0]
    path = str(tmp_path / "t.csv")
    monkeypatch.setattr("nasray.costs.latency_board.CPU", str(tmp_path))
    folder = tmp_path / f"cpu{core}" / "cpufreq"
    folder.mkdir(parents=True)
    (folder / "scaling_governor").write_text("performance\n")
    setup = Setup(cpus=str(core))
    measure_quickly(TINY, path, monkeypatch, setup=setup)
    provenance = LatencyTable.load(path, TINY).provenance
    assert provenance["cpus"] == str(core) and provenance["governor"] == "performance"
    assert provenance["affinity"] == f"1 of {os.cpu_count()} cores: {core}"
    assert doubts(path) == []
    # Another governor is another time's, not another table's.
    (folder / "scaling_governor").write_text("schedutil\n")
    edit(path, lambda lines: lines[1:])
    measure_quickly(TINY, path, monkeypatch, setup=setup)
    measured = LatencyTable.load(path, TINY)
    assert measured.provenance["governor"] == "performance; schedutil"
    [warning] = doubts(path)
    assert warning.startswith(f"{path}: the scaling governor was schedutil, ")
    assert len(check(TINY, measured, num_archs=2).rows) == 2
    with pytest.raises(UserError, match=f"was measured with cpus = {core}, this is ; give another"):
        measure(TINY, path)
    if len(os.sched_getaffinity(0)) > 1:
        assert doubts(path) and os.sched_getaffinity(0) != {core}  # given back


def test_a_table_without_the_newer_columns_is_continued_as_fp32(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    path, setup = str(tmp_path / "t.csv"), Setup(runtime="onnxruntime")
    measure_quickly(TINY, path, monkeypatch, setup=setup)
    newer = ("precision", "cpus", "affinity", "governor")
    old = [{name: line[name] for name in line if name not in newer} for line in read_lines(path)]
    write_lines(path, old[1:])
    with pytest.raises(UserError, match="with precision = fp32, this is int8; give another"):
        measure(TINY, path, setup=dataclasses.replace(setup, precision="int8"))
    measure_quickly(TINY, path, monkeypatch, setup=setup)
    assert read_lines(path)[1:] == [line | describe(TINY, setup) for line in old[1:]]
    write_lines(path, old)
    assert len(check(TINY, LatencyTable.load(path, TINY), num_archs=2).rows) == 2


def test_a_table_is_not_continued_in_another_way(tmp_path):
    path = make_table(tmp_path / "t.csv", TINY, describe(TINY, Setup(batch_size=2)))
    with pytest.raises(UserError, match="batch_size = 2, this is 1"):
        measure(TINY, path)
    path = make_table(tmp_path / "o.csv", TINY, {"device": "cpu"})  # by whom, it does not say
    with pytest.raises(UserError, match="runtime = None, this is torch"):
        measure(TINY, path)
    with pytest.raises(UserError, match="must end in .parquet or .csv"):
        measure(TINY, str(tmp_path / "t.txt"))


def test_a_table_with_other_latencies_has_another_digest(tmp_path):
    path = make_table(tmp_path / "t.csv", TINY)
    digest = LatencyTable.load(path, TINY).digest()
    edit(path, lambda lines: lines[::-1])
    assert LatencyTable.load(path, TINY).digest() == digest
    edit(path, lambda lines: [lines[0] | {"ms": "77"}, *lines[1:]])
    assert LatencyTable.load(path, TINY).digest() != digest


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"device": "tpu"}, "device = 'tpu'"),
        ({"runtime": "tvm"}, "runtime = 'tvm'"),
        ({"threads": 0}, "threads = 0"),
        ({"device": "cuda", "runtime": "onnxruntime"}, "'cpu' only"),
        ({"precision": "fp16"}, "converts most operations to fp32.*; give fp32 or int8"),
        ({"precision": "int4"}, r"'int4' must be one of \['fp32', 'int8'\]"),
        ({"precision": "int8"}, "'int8' needs runtime = 'onnxruntime'"),
        ({"cpus": "0-"}, "'0-' must be numbers of cores, e.g. 0,4-7"),
        ({"cpus": "7-4"}, "'7-4' must be numbers of cores"),
        ({"cpus": "0,1", "threads": 3}, "threads = 3 on cpus = '0,1': not more threads than"),
    ],
)
def test_a_setup_that_cannot_be_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        Setup(**values)


def test_a_pass_meets_every_block():
    wanted = wanted_blocks(SMALL, (32, 48))
    assert len(wanted) < len(wanted_blocks(SMALL))
    with pytest.raises(UserError, match="no resolution 33: they are 32, 48, 64"):
        wanted_blocks(SMALL, [33])
    archs = list(networks_with(SMALL, wanted, np.random.default_rng(0)))
    met = {block_key(block) for arch in archs for block in SMALL.decode(arch) if block is not None}
    assert met == wanted.keys()
    assert {SMALL.resolution_of(arch) for arch in archs} == {32, 48}
    assert len(archs) < 32  # a network with whatever blocks would do it in 40


def test_each_block_of_a_network_is_timed():
    arch = SMALL.named["smallest"]
    blocks = [block for block in SMALL.decode(arch) if block is not None]
    times = time_blocks(SMALL, arch, Setup())
    assert [key for key, _ in times] == [block_key(block) for block in blocks]
    assert all(ms > 0 for _, ms in times)


def test_onnxruntime_is_timed_too(tmp_path):
    pytest.importorskip("onnxruntime")
    path = str(tmp_path / "t.csv")
    measure(TINY, path, setup=Setup(runtime="onnxruntime"))
    table = LatencyTable.load(path, TINY)
    assert table.provenance["runtime"] == "onnxruntime"
    assert check(TINY, table, num_archs=3).median_relative_error < 1


def test_a_check_compares_sums_with_whole_networks(tmp_path):
    space = Tiny(resolution=64)
    path = str(tmp_path / "t.csv")
    measure(space, path)
    table = LatencyTable.load(path, space)
    agreement = check(space, table, num_archs=12)
    archs, predicted, measured = zip(*agreement.rows, strict=True)
    np.testing.assert_allclose(table(as_population(archs)), predicted)
    # Loose, for machines that do other work meanwhile.
    assert 0.2 < np.median(np.array(predicted) / np.array(measured)) < 5
    edit(path, lambda lines: [line | {"processor": "abacus"} for line in lines])
    with pytest.raises(UserError, match="abacus"):
        check(space, LatencyTable.load(path, space), num_archs=3)
    with pytest.raises(UserError, match="does not say 'runtime', as tables of `nasray"):
        check(TINY, LatencyTable.load(make_table(tmp_path / "o.csv", TINY), TINY), num_archs=3)
    edit(path, lambda lines: [line | {"threads": "some"} for line in lines])
    with pytest.raises(UserError, match=f"^{path}: invalid literal for int.*'some'"):
        check(space, LatencyTable.load(path, space), num_archs=3)


def test_agreement_is_error_bias_and_rank_correlation():
    archs = np.zeros((4, 2), dtype=np.int8)
    measured = np.array([1.0, 2.0, 4.0, 8.0])
    samples = measured[:, None] * [1.2, 0.9, 1.0]
    same = compare(archs, measured * 1.1, samples)
    assert same.median_relative_error == pytest.approx(0.1)
    assert same.median_bias == pytest.approx(0.1)
    assert same.median_scatter == pytest.approx(0.3)
    assert same.rank_correlation == 1
    swapped = compare(archs, np.array([2.0, 1.0, 4.0, 8.0]), samples)
    assert swapped.rank_correlation == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert compare(archs, -measured, samples).rank_correlation == -1


def test_a_node_of_a_cluster_measures_too(ray_cluster: None, tmp_path):
    path = str(tmp_path / "table.csv")
    setup = {"device": "cpu", "runtime": "torch", "threads": 1, "batch_size": 1}
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    measure_on_cluster(TINY, path, setup=setup, resolutions=None, labels=here)
    low, high = LatencyTable.load(path, TINY).bounds()
    assert 0 < low < high
    before = Path(path).read_text()
    measure_on_cluster(TINY, path, setup=setup, resolutions=None, labels={})
    assert Path(path).read_text() == before
    with pytest.raises(UserError, match="'tensorrt' must be one of"):
        wrong = setup | {"runtime": "tensorrt"}
        measure_on_cluster(TINY, path, setup=wrong, resolutions=None, labels={})

"""Who may import whom: the table below, by package and transitively.

An import inside a function counts as an arrow like one at the top of a file, for it is a
dependency all the same; so does one for type checkers only. Only what a module loads when it is
imported (its own imports at the top of files, and theirs) counts where a test says "loads".
"""

import ast
import graphlib
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "nasray"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each package, or module beside the packages, and what it imports of nasray. "nasray" is the
# package itself. Upper lines import lower ones, never the other way round.
ARROWS = {
    "__main__": "cli",
    "cli": "nasray doctor pipeline algorithms search costs predictors spaces data cluster "
    "config storage progress errors",
    "nasray": "api version",
    "api": "pipeline report formats export features pretrained checkpoint search costs spaces "
    "doctor data cluster config storage errors",
    "pipeline": "training evaluation algorithms formats runtimes export quantize predictors "
    "pretrained checkpoint "
    "search costs data spaces config storage progress errors version",
    "training": "evaluation checkpoint search data spaces cluster config storage devices "
    "progress errors",
    "evaluation": "search checkpoint data spaces cluster config devices errors",
    "algorithms": "search spaces config",
    "report": "search storage errors",
    "search": "costs spaces config storage errors",
    "costs": "quantize spaces cluster storage devices progress errors",
    "predictors": "spaces storage devices progress errors",
    "pretrained": "checkpoint spaces storage progress errors",
    "checkpoint": "spaces storage errors",
    "formats": "runtimes export spaces errors",
    "runtimes": "",
    "export": "data storage errors version",
    "quantize": "",
    "features": "errors",
    "spaces": "config errors",
    "data": "config storage errors",
    "cluster": "config storage errors",
    "config": "storage errors",
    "doctor": "storage errors",
    "storage": "errors",
    "progress": "",
    "devices": "",
    "errors": "",
    "version": "",
}
# Arrows between modules that break a rule below until what they are for has been redesigned.
TOLERATED: set[tuple[str, str]] = set()
MOST_ARROWS = 124  # between packages

RAY = {
    "cluster.connect",
    "cluster.jobs",
    "cluster.metrics",
    "cluster.placement",
    "cluster.worker",
    "costs.latency_cluster",
    "evaluation.evaluator",
    "evaluation.pool",
    "training.retrain",
    "training.supernet",
    "training.trial",
    "training.workers",
}
# Plug-ins know nothing of one another, but may import these of their package, and files of
# their own: shufflenet_blocks is shufflenet's.
SHARED_BY_PLUG_INS = {
    "spaces": {"space", "population", "active", "supernet", "ofa", "ofa_mbconv"},
    "algorithms": {"offspring", "many_limits"},
}
# What brings several plug-ins together.
BRINGS_TOGETHER = {"spaces", "spaces.ofa_strings", "algorithms", "algorithms.many_limits"}


class Import(NamedTuple):
    """One import: by which module of nasray, of what, and whether it waits for a call."""

    importer: str  # without "nasray."
    imported: str  # a module; of nasray's own with "nasray." or "nasray" alone
    lazy: bool


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "nasray"


MODULES = {name_of(path): path for path in FILES}


def imports_of(module: str) -> list[Import]:
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend(Import(module, alias.name, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.module and not child.level, module
                for alias in child.names:
                    name = f"{child.module}.{alias.name}"
                    is_module = name.removeprefix("nasray.") in MODULES
                    found.append(Import(module, name if is_module else child.module, lazy))
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.If)
            visit(child, lazy or inside)

    visit(ast.parse(MODULES[module].read_text()), False)
    return found


IMPORTS = [found for module in MODULES for found in imports_of(module)]
OWN = [
    found._replace(imported=found.imported.removeprefix("nasray."))
    for found in IMPORTS
    if found.imported.split(".")[0] == "nasray"
]


def package_of(module: str) -> str:
    return module.split(".")[0]


def importers_of(library: str) -> set[str]:
    return {found.importer for found in IMPORTS if package_of(found.imported) == library}


def test_packages_import_what_the_table_says():
    found: dict[str, set[str]] = {package: set() for package in map(package_of, MODULES)}
    for importer, imported, _ in OWN:
        if package_of(importer) != package_of(imported) and (importer, imported) not in TOLERATED:
            found[package_of(importer)].add(package_of(imported))
    number = sum(map(len, found.values()))
    print(f"{number} arrows between {len(found)} packages and modules beside them")
    assert found == {package: set(below.split()) for package, below in ARROWS.items()}
    assert number <= MOST_ARROWS


def test_the_table_points_down_only():
    lines = list(ARROWS)
    for package, below in ARROWS.items():
        for other in below.split():
            assert lines.index(other) > lines.index(package), f"{package} -> {other}"


def test_no_module_imports_itself_through_others():
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for importer, imported, _ in OWN:
        graph[importer].add(imported)
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_tolerated_arrows_are_still_there():
    assert {(importer, imported) for importer, imported, _ in OWN} >= TOLERATED


def test_only_these_modules_import_ray():
    assert importers_of("ray") == RAY
    # It sets what Ray reads when it is imported.
    connect = [found for found in IMPORTS if found.importer == "cluster.connect"]
    assert all(found.lazy for found in connect if found.imported == "ray")


def test_only_the_command_line_imports_click():
    assert {package_of(module) for module in importers_of("click")} == {"cli"}


def test_only_storage_opens_filesystems():
    found = {module for module in MODULES if re.search(r"pyarrow(\.| import )fs", text(module))}
    assert found == {"storage.files", "storage.locks"}


def text(module: str) -> str:
    return MODULES[module].read_text()


@pytest.mark.parametrize("package", SHARED_BY_PLUG_INS)
def test_no_plug_in_imports_a_sibling(package: str):
    shared = {f"{package}.{name}" for name in SHARED_BY_PLUG_INS[package]}
    for importer, imported, _ in OWN:
        siblings = package_of(importer) == package_of(imported) == package
        if siblings and importer not in BRINGS_TOGETHER and (importer, imported) not in TOLERATED:
            if imported.startswith(f"{importer}_"):
                continue
            assert imported in shared, f"{importer} -> {imported}"


def test_no_global_randomness():
    assert importers_of("random") == set()
    for module in MODULES:
        for name in re.findall(r"np\.random\.(\w+)", text(module)):
            allowed = ("default_rng", "Generator", "SeedSequence", "PCG64")
            assert name in allowed, (module, name)


def loaded_with(*modules: str) -> set[str]:
    program = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    return set(run.stdout.decode().split())


def modules_of(*packages: str) -> list[str]:
    return [f"nasray.{module}" for module in MODULES if package_of(module) in packages]


def test_a_search_loads_no_network_and_no_cluster():
    loaded = loaded_with(*modules_of("search", "algorithms", "config", "storage"))
    assert not {"torch", "torchvision", "ray", "click", "plotly"} & loaded


def test_an_evaluator_starts_without_what_only_training_needs():
    loaded = loaded_with("nasray.evaluation.evaluator")
    assert {"torch", "ray"} <= loaded
    assert not {"ray.train", "ray.tune", "pandas", "torchvision", "torch._dynamo"} & loaded


def test_help_answers_at_once():
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "nasray", "--help"], check=True, capture_output=True)
    assert not {"torch", "ray", "plotly", "pyarrow", "pydantic"} & loaded_with("nasray.cli.main")
    assert time.monotonic() - started < 30  # a hang, not a measurement


def test_images_are_decoded_and_cropped_without_torch():
    loaded = loaded_with("nasray.data.decoding", "nasray.data.crop")
    assert "PIL" in loaded and "torch" not in loaded

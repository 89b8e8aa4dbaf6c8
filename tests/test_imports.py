"""Who may import whom (CONTRIBUTING: the arrows point down)."""

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "nasray"
FILES = sorted(PACKAGE.rglob("*.py"))
# What several spaces share; all other files of spaces/ know nothing of one another.
SHARED = {"__init__.py", "space.py", "elastic.py", "ofa.py", "mbconv.py", "module_strings.py"}
RAY_FILES = {
    "trainer.py",
    "evaluator.py",
    "jobs.py",
    "placement.py",
    "pool.py",
    "tuner.py",
    "worker.py",
    "latency_cluster.py",
    "cli_ray.py",
}


def imports(path, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(path, **options):
    return {name.split(".")[0] for name in imports(path, **options)}


def test_only_the_ray_files_import_ray():
    assert {path.name for path in FILES} >= RAY_FILES
    for path in FILES:
        assert "ray" not in packages(path) or path.name in RAY_FILES, path
    # It sets what Ray reads when it is imported.
    assert "ray" not in packages(PACKAGE / "cli_ray.py", top_level_only=True)


def test_search_knows_no_network_and_no_cluster():
    allowed = (
        "nasray.config",
        "nasray.cost",
        "nasray.errors",
        "nasray.latency",
        "nasray.search",
        "nasray.spaces.space",
        "nasray.storage",
    )
    for path in (PACKAGE / "search").glob("*.py"):
        assert packages(path) <= {
            *sys.stdlib_module_names,
            *("numpy", "pyarrow", "nasray"),
        }, path
        for name in imports(path):
            if name.startswith("nasray."):
                assert name.startswith(allowed), (path, name)


def test_spaces_know_only_spaces_and_torch():
    for path in (PACKAGE / "spaces").glob("*.py"):
        for name in imports(path):
            if name.startswith("nasray."):
                assert name.startswith(("nasray.spaces", "nasray.errors", "nasray.config")), path
        if path.name not in SHARED:
            siblings = {other.stem for other in path.parent.glob("*.py") if other.name != path.name}
            siblings -= {Path(name).stem for name in SHARED}
            assert not {f"nasray.spaces.{name}" for name in siblings} & imports(path), path


def test_only_storage_and_datasets_open_filesystems():
    for path in FILES:
        if path.name != "storage.py":
            assert not any(name.startswith("pyarrow.fs") for name in imports(path)), path


def test_nothing_imports_the_command_line():
    for path in FILES:
        if path.name not in ("__main__.py", "cli.py"):
            assert "nasray.cli" not in imports(path), path


def test_no_global_randomness():
    for path in FILES:
        text = path.read_text()
        if path.parts[-2:] != ("search", "random.py"):
            assert "random" not in packages(path), path
        for name in re.findall(r"np\.random\.(\w+)", text):
            assert name in ("default_rng", "Generator", "SeedSequence", "PCG64"), (path, name)


def loaded_with(module):
    program = f"import sys, {module}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    return set(run.stdout.decode().split())


def test_an_evaluator_starts_without_what_only_training_needs():
    loaded = loaded_with("nasray.evaluator")
    assert {"torch", "ray"} <= loaded
    assert not {"ray.train", "ray.tune", "pandas", "torchvision", "torch._dynamo"} & loaded


def test_help_answers_at_once():
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "nasray", "--help"], check=True, capture_output=True)
    assert not {"torch", "ray", "plotly", "pyarrow", "pydantic"} & loaded_with("nasray.cli")
    assert time.monotonic() - started < 30  # a hang, not a measurement

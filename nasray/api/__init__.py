"""The Python API, whose names `import nasray` offers; the command line is a layer over it."""

from nasray.api.benchmarking import benchmark
from nasray.api.prediction import predict
from nasray.api.runs import RunDirectory, check_data, import_data, open, run
from nasray.api.spaces import DesignSpace, load, load_supernet, space

__all__ = [
    "DesignSpace",
    "RunDirectory",
    "benchmark",
    "check_data",
    "import_data",
    "load",
    "load_supernet",
    "open",
    "predict",
    "run",
    "space",
]

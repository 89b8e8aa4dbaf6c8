"""Runs an exported network by the one package that it needs, or converts one: a program of its own.

    python runtimes.py run MODEL RUNTIME IMAGES.npy LOGITS.npy
    python runtimes.py convert PROGRAM.pt2 RUNTIME SIDE TARGET
    python runtimes.py check RUNTIME

IMAGES are float32 (n, 3, side, side), RGB in 0..1, LOGITS float32 (n, classes); the last line that
is printed is {"ms": of one image with one thread, "version": of the runtime}. The packages that
convert exclude one another and some exclude nasray's, so this file imports nothing of nasray's,
which starts it with the Python of whatever environment holds them.
"""

import importlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Run = Callable[[np.ndarray], np.ndarray]  # float32 (n, 3, side, side) to logits (n, classes)

BATCH_SIZE = 32
TIMED_S = 1.0


def open_onnxruntime(model: str | bytes) -> Run:
    """Open an ONNX file, a path or its content."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


def open_openvino(path: str) -> Run:
    """Open an ONNX file in OpenVINO."""
    import openvino

    # Without the hint, processors that have bfloat16 compute float32 networks in it.
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(path, "CPU", settings)
    return lambda images: model(images)[0]


def open_torch(path: str) -> Run:
    """Open a torch.export program."""
    import torch

    torch.set_num_threads(1)
    network = torch.export.load(path).module()

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(images)).numpy()

    return run


def open_litert(path: str) -> Run:
    """Open a TFLite file."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path, num_threads=1)
    interpreter.allocate_tensors()
    source = interpreter.get_input_details()[0]["index"]
    target = interpreter.get_output_details()[0]["index"]

    def run_one(image: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(source, image)
        interpreter.invoke()
        return interpreter.get_tensor(target)

    return _one_by_one(run_one)


def open_executorch(path: str) -> Run:
    """Open an ExecuTorch program."""
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(1)  # the only way in Python to say so
    method = Runtime.get().load_program(path).load_method("forward")
    assert method is not None
    return _one_by_one(lambda image: method.execute([torch.from_numpy(image)])[0].numpy())


def _one_by_one(run_one: Run) -> Run:
    """A network whose file takes one image at a time."""
    return lambda images: np.concatenate([run_one(image[None]) for image in images])


# By name: how a file is opened, and the distribution whose version is told.
RUNTIMES: dict[str, tuple[Callable[[str], Run], str]] = {
    "onnxruntime": (open_onnxruntime, "onnxruntime"),
    "openvino": (open_openvino, "openvino"),
    "torch": (open_torch, "torch"),
    "litert": (open_litert, "ai-edge-litert"),
    "executorch": (open_executorch, "executorch"),
}

MODULES = {
    "torch": ("torch",),
    "openvino": ("openvino",),
    "litert": ("ai_edge_litert.interpreter", "litert_torch"),
    "executorch": ("executorch.runtime", "executorch.exir"),
}


def run(model: str, runtime: str, images: str, logits: str) -> dict[str, Any]:
    """Write the logits of all images, the first alone and the others in batches."""
    opened, distribution = RUNTIMES[runtime]
    network = opened(model)
    pixels = np.load(images)
    starts = [0, *range(1, len(pixels), BATCH_SIZE), len(pixels)]
    parts = zip(starts, starts[1:], strict=False)
    np.save(logits, np.concatenate([network(pixels[start:end]) for start, end in parts]))
    return {
        "ms": milliseconds(network, pixels[:1]),
        "version": importlib.metadata.version(distribution),
    }


def milliseconds(network: Run, image: np.ndarray) -> float:
    """The lower quartile of the times of one image: other work on the machine adds to some."""
    times: list[float] = []
    ends = time.perf_counter() + TIMED_S
    while len(times) < 10 or time.perf_counter() < ends:
        started = time.perf_counter()
        network(image)
        times.append(time.perf_counter() - started)
    return 1000 * float(np.quantile(times, 0.25))


def convert(program: str, runtime: str, side: str, target: str) -> dict[str, Any]:
    """Write a torch.export program as the file of another runtime, for one image at a time."""
    import torch

    network = torch.export.load(program).module()
    example = (torch.zeros(1, 3, int(side), int(side)),)
    if runtime == "litert":
        import litert_torch

        litert_torch.convert(network, example).export(target)
    else:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        exported = torch.export.export(network, example)
        lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        with open(target, "wb") as file:
            file.write(lowered.to_executorch().buffer)
    return {}


def check(runtime: str) -> dict[str, Any]:
    """Import what runs, and converts to, the files of a runtime."""
    for name in MODULES[runtime]:
        importlib.import_module(name)
    return {}


if __name__ == "__main__":
    print(json.dumps({"run": run, "convert": convert, "check": check}[sys.argv[1]](*sys.argv[2:])))

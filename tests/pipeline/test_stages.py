"""What an export finds done already, and its smaller precisions."""

from pathlib import Path

from nasray import checkpoint
from nasray.pipeline.export_formats import is_export_of
from nasray.storage import files as storage


def test_an_export_is_made_again_for_another_network_and_not_without_need(tmp_path: Path):
    weights, done, model = (f"{tmp_path}/{name}" for name in ("model.pt", "0.json", "0.onnx"))
    storage.write(weights, b"weights")
    assert not is_export_of(weights, done, model)
    storage.write(model, b"onnx")
    storage.write_json(done, {"bytes": 4})  # of a version that did not say how it is fed
    assert not is_export_of(weights, done, model)
    storage.write_json(done, {"bytes": 4, "model": checkpoint.digest(weights)})
    assert is_export_of(weights, done, model)
    storage.write(weights, b"retrained")
    assert not is_export_of(weights, done, model)
    storage.remove(weights)
    assert is_export_of(weights, done, model)

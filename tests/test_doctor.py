"""What `nasray doctor` finds on this machine, and on machines that lack something."""

import importlib.util
import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from click.testing import CliRunner

from nasray import doctor
from nasray.cli.main import main
from nasray.doctor import Finding, examine, is_well

Usage = namedtuple("Usage", "total used free")


def about(subject: str, *places: str) -> Finding:
    return next(found for found in examine(places) if found.subject == subject)


def test_this_machine_is_described_and_every_shortcoming_has_a_fix():
    found = examine()
    subjects = [each.subject for each in found]
    assert {"python", "torch", "ray", "gpu", "cpu", "shared memory", "disk"} <= set(subjects)
    for each in found:
        assert each.level == "ok" or each.fix or each.subject == "cpu"
    assert is_well([Finding("ok", "a", "b"), Finding("note", "a", "b")])
    assert not is_well([Finding("ok", "a", "b"), Finding("problem", "a", "b", "c")])


def test_torch_and_torchvision_that_are_no_pair(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    found = about("torch")
    assert found.level == "problem" and "do not match" in found.text
    assert found.fix.startswith("install both from the same index: pip install 'torch>=")


@pytest.mark.parametrize(
    "flags, level", [("fpu avx2", "note"), ("fpu avx_vnni", "ok"), (None, "note")]
)
def test_int8_products_of_a_cpu(
    flags: str | None, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "cpuinfo"
    if flags:
        file.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(doctor, "CPUINFO", file)
    assert about("cpu").level == level


def test_a_disk_that_is_nearly_full(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, 10**9))
    found = about("disk")
    assert found.level == "problem" and "1 GB free" in found.text and "another disk" in found.fix


def test_a_container_with_little_shared_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "SHARED", "/")
    monkeypatch.setattr(doctor, "_memory", lambda: 64 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 << 20, 0, 10**12))
    found = about("shared memory")
    assert found.level == "problem" and "--shm-size=19g" in found.fix


def test_a_driver_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert about("gpu").text == "none; CPUs are used"
    monkeypatch.setattr(doctor, "DRIVER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "built for CUDA 13.0" in about("gpu").text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert about("gpu").fix == "unset CUDA_VISIBLE_DEVICES"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert about("gpu").level == "problem" and "CPUs" in about("gpu").text


def test_an_optional_package_that_is_absent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = about("torchcodec")
    assert found.level == "note" and found.fix == "pip install 'nasray[decode]'"


def test_places_are_tried_and_left_as_they_were(tmp_path: Path):
    here, new = tmp_path / "runs", tmp_path / "a/new/one"
    here.mkdir()
    for place in (here, new, f"file://{here}"):
        assert about(str(place), str(place)).level == "ok"
    assert sorted(tmp_path.rglob("*")) == [here]


def test_a_place_where_nothing_can_be_written_is_a_problem_and_the_exit_status():
    result = CliRunner().invoke(main, ["doctor", "--json", "ftp://host/x"])
    assert result.exit_code == 1
    [found] = [each for each in json.loads(result.output) if each["subject"] == "ftp://host/x"]
    assert found["level"] == "problem" and "s3://" in found["text"] and found["fix"]
    lines = CliRunner().invoke(main, ["doctor", "ftp://host/x"]).output.splitlines()
    assert any(line.startswith("problem  ftp://host/x") and " -> " in line for line in lines)


def test_credentials_are_named_by_where_they_are_and_not_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIASECRET")
    found = about("object stores")
    assert "s3:// from AWS_ACCESS_KEY_ID" in found.text and "SECRET" not in found.text

"""`nasray import-weights` makes a supernet.pt of a published file, once."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import nasray
from nasray import checkpoint
from nasray.cli.main import main
from nasray.data.transforms import MEAN, STD
from nasray.pretrained.ofa import ofa_tensors
from tests.pretrained.published import formula_state, space_of

NET, SPACE = "mbv3_w1.0", "ofa_mobilenetv3"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "ofa_mbv3_d234_e346_k357_w1.0"
    torch.save({"state_dict": formula_state(NET)}, path)
    return str(path)


def call(*arguments):
    return CliRunner().invoke(main, ["import-weights", *map(str, arguments)])


def test_a_published_file_becomes_a_supernet(published, tmp_path):
    out = str(tmp_path / "supernet.pt")
    digest = hashlib.sha256(Path(published).read_bytes()).hexdigest()
    result = call(SPACE, published, out, "--set", "width=1.0", "--sha256", digest)
    assert result.exit_code == 0, result.output
    supernet = nasray.load_supernet(out)
    assert supernet.space == space_of(NET)
    found, wanted = supernet.state_dict(), ofa_tensors(space_of(NET), formula_state(NET))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    before = Path(out).stat().st_mtime_ns
    assert call(SPACE, published, out, "--set", "width=1.0").exit_code == 0
    assert Path(out).stat().st_mtime_ns == before


@pytest.mark.parametrize("content", ["classes", "weights", "text", "folder"])
def test_a_file_with_other_content_is_kept(content, published, tmp_path):
    out = tmp_path / "supernet.pt"
    if content == "folder":
        out.mkdir()
    elif content == "text":
        out.write_text("mine")
    else:
        space = space_of(NET, num_classes=10 if content == "classes" else 1000)
        checkpoint.save_supernet(str(out), space.supernet())
    before = out.stat().st_mtime_ns
    result = call(SPACE, published, out, "--set", "width=1.0")
    assert result.exit_code == 1
    wanted = f"Error: {out} exists with other content; remove it or give another name\n"
    assert result.output == wanted
    assert out.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--set", "width=1.2"], "the file has another width: set space.width = 1.0$"),
        ([], "set space.width = 1.0$"),  # 1.2 unless told
        (["--set", "width=1.0", "--num-classes", 10], "of 1000 classes, not 10; set num_classes ="),
        (["--set", "width=1.0", "--sha256", "0" * 64], "has the SHA-256 [0-9a-f]{64}, not 0000"),
        (["--set", "wide=1.0"], "unknown key 'space.wide'"),
    ],
)
def test_mistakes_are_one_line(options, complaint, published, tmp_path):
    result = call(SPACE, published, tmp_path / "supernet.pt", *options)
    assert result.exit_code == 1 and result.output.count("\n") == 1
    assert re.search(complaint, result.output.strip())
    assert not (tmp_path / "supernet.pt").exists()


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_read(tmp_path):
    result = call(SPACE, tmp_path / "nothing", "ftp://somewhere/supernet.pt")
    assert result.exit_code == 1 and "ftp:// is no storage" in result.output


def test_images_are_normalised_nearly_as_for_the_published_networks():
    """docs/pretrained.md says how nearly."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for own, its, spread in zip(MEAN, mean, std, strict=True):
        assert abs(own / 255 - its) < 0.009 * spread
    for own, its in zip(STD, std, strict=True):
        assert own / 255 == pytest.approx(its, rel=1e-4)

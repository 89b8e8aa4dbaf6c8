"""Files of weights are read from everywhere, whole or not at all, and never executed."""

import hashlib
import http.server
import io
import logging
import pickle
import socketserver
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from nasray.errors import UserError
from nasray.pretrained import files
from nasray.pretrained.files import read_state

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def as_bytes(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


SAVED = as_bytes({"state_dict": STATE})


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "weights.pth")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NASRAY_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache/weights"


def written(path, content):
    Path(path).write_bytes(content if isinstance(content, bytes) else as_bytes(content))
    return path


def assert_read(found):
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], STATE[name]) for name in STATE)


def complaint(path, **options):
    with pytest.raises(UserError) as refused:
        read_state(path, **options)
    text = str(refused.value)
    assert text.startswith(path) and "\n" not in text
    return text


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3},
        {"model": STATE},
        {"model_state": STATE},
        {"state_dict_ema": STATE, "state_dict": {"a.weight": torch.zeros(1)}},
        {"model": {"state_dict": STATE}},
        {"state_dict": {f"module.{name}": each for name, each in STATE.items()}},
        {f"_orig_mod.module.{name}": each for name, each in STATE.items()},
        {"model_ema": STATE, "model": {"a.weight": torch.zeros(1)}},
        {"state_dict": {f"model.{name}": each for name, each in STATE.items()}},
        {"n_averaged": torch.tensor(3)} | {f"module.{name}": each for name, each in STATE.items()},
        {name: nn.Parameter(each) for name, each in STATE.items()},
    ],
)
def test_tensors_are_found_wherever_programs_put_them(path, content):
    found = read_state(written(path, content))
    assert_read(found)
    assert not any(isinstance(each, nn.Parameter) or each.requires_grad for each in found.values())


def test_a_prefix_that_not_all_names_share_is_part_of_them(path):
    written(path, {"module.a": torch.ones(1), "b": torch.ones(1)})
    assert read_state(path).keys() == {"module.a", "b"}


def test_the_old_format_of_torch_is_read(path):
    assert_read(read_state(written(path, as_bytes(STATE, _use_new_zipfile_serialization=False))))


def test_files_of_safetensors_are_read(path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    content = safetensors.save(STATE)
    assert_read(read_state(written(path, content)))
    written(path, content[:-3])
    assert "is no readable file of weights (" in complaint(path)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    assert "which is not installed: pip install safetensors" in complaint(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_named(path, keep, legacy):
    content = as_bytes(STATE, _use_new_zipfile_serialization=not legacy)
    written(path, content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    text = complaint(path)
    assert "is no readable file of weights (" in text and text.endswith("; fetch it again")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\n<!DOCTYPE html><html>Forbidden", "(it is a web page); give the address of the file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "(it is a Git LFS pointer); fetch"),
        (b"hello world\n", "(it is damaged, or not written by torch.save or safetensors); fetch"),
        (b"weights", "(it is damaged, or not written by torch.save or safetensors); fetch"),
        ({"n_averaged": torch.ones(())}, "holds no tensors by name"),
        ({"state_dict": {}}, "holds no tensors by name; save its weights alone"),
        ([torch.ones(1)], "holds no tensors by name"),
        ({"a": torch.ones(1), "epoch": 3}, "holds 'epoch' of type int where only tensors"),
        ({0: torch.ones(1)}, "holds 0 of type Tensor where only tensors by name"),
        ({"a": torch.ones(2).to_sparse()}, "holds 'a' as a sparse tensor; save its values"),
        ({"a": torch.ones(2, device="meta")}, "holds 'a' as a meta tensor; save its values"),
    ],
)
def test_what_holds_no_weights_says_what_it_is(path, content, words):
    assert words in complaint(written(path, content))


class Evil:
    """Opens a file if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_file_that_would_run_code_is_refused(tmp_path, path, protocol):
    evil = Evil(str(tmp_path / "ran"))
    contents = [
        as_bytes({"state_dict": STATE, "evil": evil}, pickle_protocol=protocol),
        as_bytes(evil, pickle_protocol=protocol, _use_new_zipfile_serialization=False),
        pickle.dumps(evil, protocol),
    ]
    for content in contents:
        complaint(written(path, content))
    assert not (tmp_path / "ran").exists()
    pickle.loads(contents[-1]).close()  # so that the lines above can fail
    assert (tmp_path / "ran").exists()


def test_a_whole_network_is_refused_with_the_fix(path):
    text = complaint(written(path, nn.Linear(2, 2)))
    assert "it holds more than tensors: torch.nn.modules.linear.Linear); save its weights" in text


def test_what_is_no_file_is_named(tmp_path):
    assert "does not exist" in complaint(str(tmp_path / "nothing.pth"))
    assert "cannot be read" in complaint(str(tmp_path))
    assert "ftp:// is no storage" in complaint("ftp://somewhere/weights.pth")


def test_the_digest_is_checked(path):
    digest = hashlib.sha256(SAVED).hexdigest()
    assert_read(read_state(written(path, SAVED), digest))
    assert_read(read_state(path, digest.upper()))
    assert f"has the SHA-256 {digest}, not {'0' * 64}; fetch" in complaint(path, sha256="0" * 64)
    for wrong in ("abc", "g" * 64):
        with pytest.raises(UserError, match="must be 64 hexadecimal digits"):
            read_state(path, wrong)


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Serves `pages`; those that are not bytes are called with the handler."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages = {}
        self.asked = []
        self.ended = threading.Event()

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        page = self.server.pages.get(self.path.rpartition("/")[2])
        if page is None:
            self.send_error(404)
        elif isinstance(page, bytes):
            self.answer(page, len(page))
        else:
            page(self)

    def answer(self, content, length=None):
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join()


def test_a_download_is_whole_shown_and_kept(server, cache, caplog, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 500)
    server.pages["ofa net?download=true"] = SAVED
    url = server.url("ofa%20net?download=true")
    server.pages["ofa%20net?download=true"] = SAVED
    with caplog.at_level(logging.INFO):
        assert_read(read_state(url))
    assert f"downloading {url} (0.0 MB)" in caplog.text
    assert f"/{-(-len(SAVED) // 500)}" in caplog.text
    [kept] = cache.iterdir()
    assert kept.read_bytes() == SAVED
    assert_read(read_state(url, hashlib.sha256(SAVED).hexdigest()))
    assert len(server.asked) == 1


def test_a_kept_file_that_was_damaged_or_is_another_is_fetched_again(server, cache):
    server.pages["net"] = SAVED
    url = server.url("net")
    read_state(url)
    [kept] = cache.iterdir()
    kept.write_bytes(SAVED[:-1])
    assert_read(read_state(url))
    assert len(server.asked) == 2
    assert [file.read_bytes() for file in cache.iterdir()] == [SAVED]
    newer = as_bytes(STATE)
    server.pages["net"] = newer
    assert_read(read_state(url, hashlib.sha256(newer).hexdigest()))
    assert len(server.asked) == 3
    assert_read(read_state(url, hashlib.sha256(newer).hexdigest()))
    assert len(server.asked) == 3
    assert [file.read_bytes() for file in cache.iterdir()] == [newer]
    server.pages["other"] = SAVED
    read_state(server.url("other"))
    assert len(server.asked) == 4


def test_a_download_of_another_digest_is_not_kept(server, cache):
    server.pages["net"] = SAVED
    text = complaint(server.url("net"), sha256="1" * 64)
    assert hashlib.sha256(SAVED).hexdigest() in text
    assert not cache.exists()


def test_without_room_for_it_a_download_is_used_all_the_same(server, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("NASRAY_CACHE", str(tmp_path / "file"))
    server.pages["net"] = SAVED
    assert_read(read_state(server.url("net")))
    assert "is not kept in" in caplog.text


def test_a_length_that_is_not_told_is_no_fault(server):
    server.pages["net"] = lambda handler: handler.answer(SAVED)
    assert_read(read_state(server.url("net")))


def test_what_cannot_be_downloaded_names_the_address_and_a_way_out(server, cache, monkeypatch):
    monkeypatch.setattr(files, "TIMEOUT_S", 0.3)
    server.pages["short"] = lambda handler: handler.answer(SAVED[:-9], len(SAVED))
    server.pages["hangs"] = lambda handler: server.ended.wait(10)
    server.pages["stops"] = lambda handler: (
        handler.answer(SAVED[:9], len(SAVED)),
        handler.wfile.flush(),
        server.ended.wait(10),
    )
    with Server() as closed:
        refusing = closed.url("net")
    for url, reason in {
        server.url("nothing"): "HTTP 404",
        server.url("short"): "IncompleteRead",
        server.url("hangs"): "timed out",
        server.url("stops"): "timed out",
        refusing: "Connection refused",
        "http://": "no host",
        "http://127.0.0.1:port/net": "nonnumeric port",
        server.url("a b"): "control characters",
    }.items():
        text = complaint(url)
        assert reason in text and "download it by other means and give the path" in text
    assert not cache.exists()


def test_proxies_of_the_environment_are_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    server.pages["net"] = SAVED
    assert_read(read_state("http://weights.invalid/net"))
    assert server.asked == ["http://weights.invalid/net"]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_tensors_are_refused(path):
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    assert "holds 'a' as a quantized tensor" in complaint(written(path, {"a": quantized}))

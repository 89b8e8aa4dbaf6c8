"""Files are written whole, or not at all."""

import os
import re

import pytest
from pyarrow import fs

from nasray.errors import UserError
from nasray.storage import files as storage
from nasray.storage import locks


def test_json_comes_back(tmp_path):
    path = storage.join(str(tmp_path), "a", "b.json")
    storage.write_json(path, {"x": [1, 2.5, None]})
    assert storage.read_json(path) == {"x": [1, 2.5, None]}
    assert storage.list_names(str(tmp_path / "a")) == ["b.json"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(path, {"x": float("nan")})
    assert storage.read_json(path) == {"x": [1, 2.5, None]}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = str(tmp_path / "file")
    storage.write(path, b"old")

    def fail(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        storage.write(path, b"new")
    assert storage.read(path) == b"old"
    assert storage.list_names(str(tmp_path)) == ["file"]


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"plain")
    path = str(tmp_path / "file" / "table.csv")
    with pytest.raises(OSError, match=r"table\.csv") as caught:
        storage.write(path, b"x")
    assert caught.value.filename == path


def test_absent_places_are_empty(tmp_path):
    nowhere = str(tmp_path / "nowhere")
    assert storage.list_names(nowhere) == []
    assert not storage.exists(nowhere)
    storage.remove(nowhere)


def test_remove_takes_files_and_folders(tmp_path):
    for name in ("a/b/c", "d"):
        storage.write(str(tmp_path / name), b"x")
    storage.remove(str(tmp_path / "a"))
    storage.remove(str(tmp_path / "d"))
    assert storage.list_names(str(tmp_path)) == []


def test_relative_paths_become_absolute_and_uris_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/x") == str(tmp_path / "runs" / "x")
    assert storage.absolute("s3://bucket/run/") == "s3://bucket/run"
    assert storage.absolute("") == ""


def test_uris_name_their_filesystem(tmp_path):
    filesystem, place = storage.resolve(f"file://{tmp_path}/x")
    assert filesystem.type_name == "local"
    assert place == f"{tmp_path}/x"


def test_a_uri_of_no_known_kind_is_one_line():
    with pytest.raises(UserError, match="ftp://host/x: .*give a folder, or s3://"):
        storage.resolve("ftp://host/x")


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        # Names of files would be appended to these, and all be one object.
        ("s3://bucket/run?region=us-east-1", "'?' in a URI"),
        ("s3://bucket/run#1", "'#' in a URI"),
        ("s3://bucket/my run", "' ' in a URI"),
        ("s3://", "s3:// names no folder; give one such as s3://bucket/run"),
        ("gs:///", "gs:/// names no folder"),
        ("s3://bucket//run", "an empty name between slashes"),
    ],
)
def test_a_uri_that_names_no_folder_of_its_own_is_refused(uri, complaint):
    for use in (storage.absolute, storage.resolve, storage.list_names):
        with pytest.raises(UserError, match=re.escape(complaint)):
            use(uri)


def test_list_below_tells_files_from_folders(tmp_path):
    for name in ("a/b/c", "d"):
        storage.write(str(tmp_path / name), b"x")
    assert storage.list_below(str(tmp_path)) == (["a/b/c", "d"], ["a", "a/b"])
    assert storage.list_below(f"file://{tmp_path}/a/") == (["b/c"], ["b"])


def test_a_held_folder_is_refused_to_others_and_free_afterwards(tmp_path):
    folder = str(tmp_path / "new")
    with locks.held(folder), pytest.raises(UserError, match="in use"), locks.held(folder):
        raise AssertionError("held twice")
    with locks.held(folder):
        pass


@pytest.fixture
def failing(monkeypatch):
    """A bucket whose first writes fail, and the pauses between them."""
    store = fs.SubTreeFileSystem("/", fs.LocalFileSystem())
    failures, pauses = [], []

    class Bucket:
        type_name = "s3"

        def open_output_stream(self, place):
            if failures:
                raise failures.pop()
            return store.open_output_stream(place)

    monkeypatch.setattr(storage, "resolve", lambda path: (Bucket(), path.removeprefix("s3:/")))
    monkeypatch.setattr("tenacity.nap.time.sleep", pauses.append)
    return failures, pauses


def test_a_write_to_an_object_store_is_repeated_until_it_succeeds(tmp_path, failing, caplog):
    failures, pauses = failing
    failures += [OSError("no route"), TimeoutError(110, "timed out"), OSError("slow down")]
    storage.write(f"s3:/{tmp_path}/object", b"content")
    assert (tmp_path / "object").read_bytes() == b"content"
    assert len(pauses) == 3 and pauses == sorted(pauses)
    assert "slow down; trying again in 0.5 s" in caplog.text


def test_a_write_that_may_not_be_repeated_fails_at_once(tmp_path, failing):
    failures, pauses = failing
    failures.append(OSError("no route"))
    with pytest.raises(OSError, match="no route"):
        storage.write(f"s3:/{tmp_path}/object", b"content", retry_s=0)
    assert not pauses


def test_a_write_to_a_disk_is_repeated_only_on_demand(tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr("tenacity.nap.time.sleep", pauses.append)
    (tmp_path / "file").write_bytes(b"")
    path = f"{tmp_path}/file/below"  # which can never be written
    with pytest.raises(OSError):
        storage.write(path, b"")
    assert not pauses
    with pytest.raises(OSError):
        storage.write(path, b"", retry_s=0.05)
    assert pauses


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("NASRAY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert storage.cache_folder() == "/home/someone/.cache/nasray"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert storage.cache_folder() == "/var/cache/nasray"
    monkeypatch.setenv("NASRAY_CACHE", "/scratch")
    assert storage.cache_folder() == "/scratch"


def test_on_a_network_home_the_cache_is_on_the_nodes_own_disk(tmp_path, monkeypatch):
    monkeypatch.delenv("NASRAY_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "my home/.cache"))
    mounts = tmp_path / "mountinfo"
    monkeypatch.setattr(storage, "MOUNTS", str(mounts))
    monkeypatch.setattr(storage, "LOCAL_CACHE", str(tmp_path / "local"))
    root = "22 1 0:20 / / rw - ext4 /dev/sda rw\n"
    home = f"23 22 0:21 / {tmp_path}/my\\040home rw shared:1 - nfs4 server:/home rw\n"
    mounts.write_text(root)
    assert storage.cache_folder() == f"{tmp_path}/my home/.cache/nasray"
    mounts.write_text(root + home)
    assert storage.cache_folder() == f"{tmp_path}/local/nasray-{os.getuid()}"
    assert (tmp_path / f"local/nasray-{os.getuid()}").stat().st_mode & 0o777 == 0o700
    # Somebody else's folder, or no local disk: one folder for each node.
    mounts.write_text(root.replace("ext4", "nfs") + home)
    assert storage.cache_folder() == f"{tmp_path}/my home/.cache/nasray/{os.uname().nodename}"
    monkeypatch.setenv("NASRAY_CACHE", "/given")
    assert storage.cache_folder() == "/given"


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a power failure may leave an empty file under that name."""
    done, fsync, replace = [], os.fsync, os.replace

    def note(name, call):
        monkeypatch.setattr(os, name, lambda *given: done.append(name) or call(*given))

    note("fsync", fsync)
    note("replace", replace)
    storage.write(str(tmp_path / "file"), b"x")
    assert done == ["fsync", "replace", "fsync"]


def test_two_writers_never_share_a_partial_file(tmp_path, monkeypatch):
    """Containers on a shared folder may have the same host name and process ids."""
    partial = []

    def fail(source, target):
        partial.append(source)
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    for _ in range(2):
        with pytest.raises(OSError):
            storage.write(str(tmp_path / "file"), b"x")
    assert len(set(partial)) == 2


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(28, "No space left on device", "/r/a"),
            "/r/a: No space left on device; free some",
        ),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device; free some"),
        (PermissionError(13, "Permission denied", "/r"), "/r: Permission denied; change its perm"),
        (OSError(30, "Read-only file system", "/r"), "/r: Read-only file system; give a folder"),
        (OSError(116, "Stale file handle", "/r"), "/r: Stale file handle; mount it anew, then"),
        (FileNotFoundError(2, "No such file", "/r"), "/r: No such file"),
        (OSError("When reading\n key 'a'"), "When reading key 'a'"),
    ],
)
def test_an_error_of_a_file_is_told_with_what_to_do(error, line):
    assert storage.told(error).startswith(line)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is not readable JSON"),
        (b'{"val_top1": 0.5', "is not readable JSON"),
        (b"null", ": not written by nasray, it is no object"),
        (b"[]", ": not written by nasray, it is no object"),
        (
            b"{}",
            ": not written by nasray, it lacks 'val_top1'; restore it, or remove it and run ag",
        ),
    ],
)
def test_a_damaged_record_is_named_and_not_taken_for_none(tmp_path, content, why):
    path = f"{tmp_path}/result.json"
    storage.write(path, content)
    with pytest.raises(UserError, match=re.escape(f"{path}{why if why[0] == ':' else ' ' + why}")):
        storage.read_object(path, "val_top1")
    if content != b"[]":
        with pytest.raises(UserError, match=re.escape(path)):
            storage.read_rows(path)

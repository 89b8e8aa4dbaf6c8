"""Leases keep two processes apart where there are no locks: on an object store."""

import _thread
import fcntl
import os
import threading
import time
from contextlib import suppress

import pytest
from pyarrow import fs

from nasray.errors import UserError
from nasray.storage import files as storage
from nasray.storage import locks
from nasray.storage.locks import leased


@pytest.fixture(autouse=True)
def bucket(tmp_path, monkeypatch):
    """s3:// is a folder here, and renewals are quick."""
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(storage, "resolve", lambda path: (store, path.removeprefix("s3://")))
    monkeypatch.setattr(locks, "RENEW_EVERY_S", 0.1)
    return tmp_path


def leases(bucket):
    return sorted(path.name for path in (bucket / "run" / "_leases").iterdir())


def test_a_second_process_is_refused_while_the_first_lives(bucket):
    with locks.held("s3://run"):
        with pytest.raises(UserError, match="s3://run is in use by another nasray process"):
            with locks.held("s3://run"):
                raise AssertionError("held twice")
        assert len(leases(bucket)) == 1  # the refused one took its own away
    assert leases(bucket) == []
    with locks.held("s3://run"):
        pass


def test_a_dead_holder_is_noticed_and_cleared_away(bucket):
    storage.write_json("s3://run/_leases/dead.json", {"renewed": 7})
    started = time.monotonic()
    with leased("s3://run"):
        assert "dead.json" not in leases(bucket)
    assert time.monotonic() - started >= 0.1 * locks.DEAD_AFTER


def test_who_looks_again_and_again_knows_a_dead_holder_from_one_that_lives(bucket):
    watcher = locks.Watcher("s3://run")
    assert watcher.holder() == ""
    storage.write_json("s3://run/_leases/dead.json", {"host": "here", "pid": 7, "renewed": 7})
    assert watcher.holder() == "process 7 on here"  # so far it may be alive
    time.sleep(0.1 * locks.DEAD_AFTER + 0.1)
    assert watcher.holder() == ""
    with leased("s3://run"):
        for _ in range(3):
            assert f"process {os.getpid()} on" in watcher.holder()
            time.sleep(0.1 * locks.DEAD_AFTER)
    assert watcher.holder() == ""


def test_of_two_that_start_together_not_both_go_on(bucket):
    storage.write_json("s3://run/_leases/dead.json", {"renewed": 7})
    outcomes, start = [], threading.Barrier(2)

    def hold():
        start.wait()
        try:
            with leased("s3://run"):
                outcomes.append("held")
                time.sleep(1)
        except UserError:
            outcomes.append("refused")

    threads = [threading.Thread(target=hold) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("held") <= 1 and len(outcomes) == 2


def test_a_holder_that_was_taken_for_dead_is_stopped(bucket, monkeypatch):
    stopped = threading.Event()
    monkeypatch.setattr(_thread, "interrupt_main", stopped.set)
    with leased("s3://run"):
        [own] = leases(bucket)
        (bucket / "run" / "_leases" / own).unlink()
        assert stopped.wait(5)


def test_a_storage_that_is_away_for_a_while_ends_nothing(bucket, monkeypatch):
    with leased("s3://run"):
        write = storage.write

        def away(path, content, *, retry_s):
            raise OSError("no route")

        monkeypatch.setattr(storage, "write", away)
        time.sleep(0.4)
        monkeypatch.setattr(storage, "write", write)
        time.sleep(0.3)
        assert len(leases(bucket)) == 1


def test_a_holder_that_slept_through_a_takeover_is_stopped_even_if_its_lease_came_back(
    bucket, monkeypatch
):
    stopped = threading.Event()
    monkeypatch.setattr(_thread, "interrupt_main", stopped.set)
    write = storage.write

    def slow(path, content, *, retry_s):  # a renewal that hangs while another process takes over
        if b'"renewed": 1' in content:
            for lease_file in (bucket / "run" / "_leases").iterdir():
                lease_file.unlink()
            write("s3://run/_leases/other.json", b"{}")
            time.sleep(0.6)
        write(path, content, retry_s=retry_s)

    monkeypatch.setattr(storage, "write", slow)
    with leased("s3://run"):
        assert stopped.wait(5)


def test_a_holder_that_was_taken_over_writes_and_removes_nothing_more(bucket, monkeypatch):
    monkeypatch.setattr(_thread, "interrupt_main", lambda: None)  # the write comes first
    now, late = locks._now, [0.0]
    monkeypatch.setattr(locks, "_now", lambda: now() + late[0])
    storage.write("s3://run/before", b"x")
    with leased("s3://run"):
        late[0] = 100.0  # it was paused; nobody took over
        storage.write("s3://run/own", b"x")
        late[0] = 200.0
        [own] = leases(bucket)
        (bucket / "run" / "_leases" / own).unlink()
        for change in (lambda: storage.write("s3://run/own", b"late"), remove_before):
            with pytest.raises(UserError, match="^s3://run was taken over by another nasray proc"):
                change()
        storage.write("s3://elsewhere/own", b"x")
    assert (bucket / "run/own").read_bytes() == b"x" and (bucket / "run/before").exists()
    storage.write("s3://run/own", b"by whoever holds it now")


def remove_before():
    storage.remove("s3://run/before")


def test_an_interrupt_by_a_takeover_says_so(bucket):
    with pytest.raises(UserError, match="taken over"), leased("s3://run"):
        [own] = leases(bucket)
        for _ in range(50):  # a renewal under way makes it again
            (bucket / "run" / "_leases" / own).unlink(missing_ok=True)
            time.sleep(0.1)


@pytest.fixture
def plain_files(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(locks, "RENEW_EVERY_S", 0.2)


def test_where_other_nodes_see_the_folder_flock_is_not_enough(plain_files, tmp_path, monkeypatch):
    """flock that holds on one node only: both processes get it."""
    monkeypatch.setattr(locks, "seen_by_other_nodes", lambda place: True)
    monkeypatch.setattr(fcntl, "flock", lambda file, how: None)
    folder = str(tmp_path / "run")
    with locks.held(folder):
        assert locks.holder(folder).startswith("process ")
        with pytest.raises(UserError, match="in use by another nasray process"):
            with locks.held(folder):
                raise AssertionError("held twice")
    assert locks.holder(folder) == ""


def test_a_file_system_that_other_nodes_see_is_recognised(plain_files, tmp_path, monkeypatch):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        "30 27 0:40 / /mnt/my\\040bucket rw shared:1 - fuse.gcsfuse bucket rw\n"
        "31 27 0:41 / /home rw - nfs4 server:/home rw\n"
        "32 31 0:42 / /home/me/scratch rw - xfs /dev/vdb rw\n"
    )
    monkeypatch.setattr(storage, "MOUNTS", str(mounts))
    found = {
        place: locks.seen_by_other_nodes(place)
        for place in ("/mnt/my bucket/run", "/home/me", "/home/me/scratch/run", "/homes", "/")
    }
    assert list(found.values()) == [True, True, False, False, False]
    monkeypatch.setattr(storage, "MOUNTS", str(tmp_path / "none"))  # not Linux
    assert not locks.seen_by_other_nodes("/home/me")


def test_a_temporary_folder_goes_and_its_lease_is_not_missed(bucket, monkeypatch):
    stopped, remove = threading.Event(), storage.remove
    monkeypatch.setattr(_thread, "interrupt_main", stopped.set)

    def slow(path):
        remove(path)
        time.sleep(0.3)

    monkeypatch.setattr(storage, "remove", slow)
    with locks.held("s3://table.in-use", temporary=True):
        assert not stopped.wait(0.3)
    assert not stopped.is_set()


def test_a_temporary_local_folder_goes(plain_files, tmp_path):
    with locks.held(str(tmp_path / "table.in-use"), temporary=True):
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_a_paused_holder_that_wakes_before_the_takeover_goes_on(bucket, monkeypatch):
    """The other process sees its lease renewed, and is refused; not both end."""
    now, late = locks._now, [0.0]
    monkeypatch.setattr(locks, "_now", lambda: now() + late[0])
    other, next_one = (bucket / f"run/_leases/{name}.json" for name in ("other", "next"))
    with pytest.raises(UserError, match="taken over"), leased("s3://run"):
        other.write_bytes(b"{}")
        threading.Timer(0.2, other.unlink).start()
        monkeypatch.setattr(locks, "DEAD_AFTER", 600)  # it has a minute for that
        late[0] = 1000.0
        storage.write("s3://run/file", b"x")
        assert not other.exists()
        monkeypatch.setattr(locks, "DEAD_AFTER", 4)
        next_one.write_bytes(b"{}")  # this one stays: it has taken over
        late[0] = 2000.0
        with suppress(UserError):  # of the write, unless the renewing thread is quicker
            storage.write("s3://run/file", b"late")
        time.sleep(5)  # which that thread interrupts
    assert (bucket / "run/file").read_bytes() == b"x"

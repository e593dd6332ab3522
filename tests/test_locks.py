"""One process at a time writes a folder or trains in it, whichever process is killed."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, recipe_arguments, run_recipe

from unlabeled import UserError
from unlabeled.data.preparing import load_prepared, prepare
from unlabeled.data.sources import Source
from unlabeled.data.tokenization import load_tokenizer
from unlabeled.hub.contents import find_push_contents
from unlabeled.runtime import locks, run_lock, staging
from unlabeled.runtime.lock_holders import Holder, Process
from unlabeled.runtime.locks import FileLock
from unlabeled.runtime.output_dir import acquire_output_dir
from unlabeled.runtime.run_lock import LOCK_FILE, hold_output_dir, release_output_dirs
from unlabeled.runtime.staging import folder_lock, staged_folder

# The code of another process, which then waits to be killed.
HOLD = """
import signal, subprocess, sys, time
from unlabeled.runtime import locks
from unlabeled.runtime import run_lock
run_lock.hold_output_dir(sys.argv[1])
{more}
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def other_process(code: str, *arguments: object):
    """Start a Python process with the package and wait for its first line."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout.readline(), "it has failed"
            yield process
        finally:
            process.kill()


@contextmanager
def orphan(folder: Path, tmp_path: Path, more: str = "", launcher: str = "torchrun"):
    """Yield the process id of a process that holds `folder`, after its launcher was killed."""
    script = tmp_path / launcher
    script.write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', *sys.argv[1:]], start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, script, HOLD.format(more=more), folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        pid = int(process.stdout.readline())
        assert process.stdout.readline() == "held\n"
        process.kill()
        process.wait()
        try:
            yield pid
        finally:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(autouse=True)
def clean_locks():
    yield
    release_output_dirs()


# --- The lock ---------------------------------------------------------------------------------------------------------


def test_lock_of_killed_process_with_worker(tmp_path):
    """A forked process, such as a data-loader worker, does not keep the lock."""
    code = """
        import os, sys, time
        from unlabeled.runtime.locks import FileLock
        assert FileLock(sys.argv[1]).acquire()
        worker = os.fork()
        if worker:
            print(worker, flush=True)
        time.sleep(60)
    """
    lock = FileLock(tmp_path / "lock")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code), lock.path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        worker = int(process.stdout.readline())
        assert not lock.acquire()
        process.kill()
        process.wait()
        try:
            assert lock.acquire(timeout=5) and is_alive(worker)
        finally:
            os.kill(worker, signal.SIGKILL)
    assert lock.is_held
    lock.release()
    assert not os.path.exists(lock.path)


def test_lock_with_deleted_file(tmp_path):
    first, second, third = (FileLock(tmp_path / "lock") for _ in range(3))
    assert first.acquire() and not second.acquire()
    os.unlink(first.path)
    assert not first.is_held
    assert second.acquire() and second.is_held
    first.release()
    assert os.path.exists(second.path), "the file of the second is not that of the first"
    assert not third.acquire()
    second.release()
    assert third.acquire()
    third.release()


def test_lock_file_deleted_after_opening(tmp_path, monkeypatch):
    """The last holder deletes it: a lock on what nobody else can open would be worth nothing."""
    first, second = (FileLock(tmp_path / "lock") for _ in range(2))
    flock, calls = fcntl.flock, []

    def flock_late(descriptor, operation):
        if not calls:
            first.release()
        calls.append(descriptor)
        flock(descriptor, operation)

    assert first.acquire()
    monkeypatch.setattr(fcntl, "flock", flock_late)
    assert second.acquire() and second.is_held and len(calls) == 2
    assert not first.acquire()
    second.release()


def test_file_system_without_locks(tmp_path, monkeypatch, capsys):
    """Work continues with one warning; leftovers are not removed, as another process may be writing them."""

    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "_missing_locks_reported", False)
    other = tmp_path / "data.incomplete-1"
    other.mkdir()
    for name in ("data", "more"):
        with staged_folder(tmp_path / name) as staged:
            (staged / "file").write_text("text")
    (tmp_path / "run").mkdir()
    hold_output_dir(tmp_path / "run")
    assert other.exists() and (tmp_path / "data" / "file").exists() and (tmp_path / "more" / "file").exists()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "has no locks" in lines[0]


# --- Staged folders ---------------------------------------------------------------------------------------------------


def test_staged_folder(tmp_path):
    target = tmp_path / "data"
    for leftover in ("data.incomplete-1", "data.incomplete-merge", "data.incomplete-f00"):
        (tmp_path / leftover).mkdir()
    (tmp_path / "database.incomplete-1").mkdir()
    with pytest.raises(KeyError), staged_folder(target) as staged:
        assert sorted(path.name for path in tmp_path.glob("data.*")) == [staged.name]
        raise KeyError
    assert sorted(os.listdir(tmp_path)) == ["database.incomplete-1"]
    before = os.umask(0o027)
    try:
        with staged_folder(target) as staged:
            (staged / "file").write_text("text")
    finally:
        os.umask(before)
    assert sorted(os.listdir(tmp_path)) == ["data", "database.incomplete-1"]
    assert target.stat().st_mode & 0o777 == 0o750, "others may read it as the umask says"
    with staged_folder(target) as staged:
        assert staged is None


def test_flush_before_rename(tmp_path, monkeypatch):
    calls = []
    flush, rename = os.fsync, os.rename

    def record_flush(descriptor):
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        flush(descriptor)

    def record_rename(source, target):
        calls.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_flush)
    monkeypatch.setattr(os, "rename", record_rename)
    with staged_folder(tmp_path / "data") as staged:
        (staged / "inner").mkdir()
        (staged / "inner" / "file").write_text("text")
        (staged / "other").write_text("text")
    before = {str(staged / name) for name in ("inner/file", "other", "inner", ".")}
    assert {os.path.normpath(path) for path in before} == set(calls[:-2])
    assert calls[-2:] == ["rename", str(tmp_path)]


def test_second_writer(tmp_path, capsys):
    target = tmp_path / "data"
    found = []

    def write_again() -> None:
        with staged_folder(target) as staged:
            found.append(staged)

    with staged_folder(target) as staged:
        thread = threading.Thread(target=write_again)
        thread.start()
        end = time.monotonic() + 10
        while "waiting for another process" not in (output := capsys.readouterr().out) and time.monotonic() < end:
            time.sleep(0.01)
        assert output == f"waiting for another process that writes {target}\n"
        (staged / "file").write_text("text")
    thread.join()
    assert found == [None] and os.listdir(tmp_path) == ["data"]


# --- The lock of a run ------------------------------------------------------------------------------------------------


def test_second_run(corpus, tokenizers, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with other_process(HOLD.format(more=""), folder) as process:
        started = time.monotonic()
        with pytest.raises(UserError) as error:
            run_recipe("pretrain_clm", recipe_arguments("clm", "llama", corpus, tokenizers, folder))
        assert time.monotonic() - started < run_lock.LOCAL_WAIT_SECONDS / 2, "at once, for it is at work"
        error.match(
            rf"^output_dir {folder} is in use by process {process.pid} on {os.uname().nodename}, started "
            r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\S* \(-c\); wait for its end, stop it, or set output_dir to another folder$"
        )
        assert process.poll() is None, "and it is left alone"
        assert os.listdir(folder) == [LOCK_FILE]
        process.kill()
        process.wait()
        assert acquire_output_dir(str(folder), {"seed": 1}) is False
    assert Holder.read(folder / LOCK_FILE).process.pid == os.getpid()


def test_lock_by_first_process_only(tmp_path):
    with other_process(HOLD.format(more=""), tmp_path):
        assert acquire_output_dir(str(tmp_path), {"seed": 1}, is_first=False) is False


def test_run_finished_while_waiting(tmp_path, monkeypatch):
    """The other process has finished the training while this one waited."""
    acquire_output_dir(str(tmp_path), {"seed": 1})
    release_output_dirs()
    monkeypatch.setattr(
        "unlabeled.runtime.output_dir.hold_output_dir", lambda folder: (tmp_path / "metrics.json").touch()
    )
    assert acquire_output_dir(str(tmp_path), {"seed": 1}) is True


def test_lock_of_recreated_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    hold_output_dir(folder)
    hold_output_dir(folder)
    (folder / LOCK_FILE).unlink()
    hold_output_dir(folder)
    assert (folder / LOCK_FILE).exists() and not FileLock(folder / LOCK_FILE).acquire()


def test_lock_file_content(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes/sft.py", "--hub_token", "hf_Secret", "--config", "sft.yaml", "--seed=1"])
    (tmp_path / "config.json").write_text("{}")
    hold_output_dir(tmp_path)
    record = json.loads((tmp_path / LOCK_FILE).read_text())
    assert record["process"]["command"] == "recipes/sft.py --config sft.yaml"
    assert record["process"]["pid"] == os.getpid() and record["process"]["host"] == os.uname().nodename
    assert record["launcher"] is None
    assert list(find_push_contents(tmp_path)[0]) == ["config.json"]
    (tmp_path / "config.json").unlink()
    release_output_dirs()
    (tmp_path / LOCK_FILE).write_text(json.dumps(record))
    assert acquire_output_dir(str(tmp_path), {"seed": 1}) is False, (
        "what a killed run has left is no file of another program"
    )


@pytest.mark.parametrize("record", ["", "{", "[]", '{"process": {}, "launcher": null}', '{"process": 1}'])
def test_unreadable_lock_record(record, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "LOCAL_WAIT_SECONDS", 0.2)
    with other_process(HOLD.format(more=""), tmp_path):
        (tmp_path / LOCK_FILE).write_text(record)
        with pytest.raises(UserError, match="is in use by another process; wait"):
            hold_output_dir(tmp_path)


def test_lock_of_child_of_killed_run(tmp_path, capsys):
    """A child process that inherited the lock outlives the run, and ends."""
    more = """
(lock,) = locks._held_locks
subprocess.Popen(["sleep", "1"], pass_fds=[lock.descriptor], stdout=subprocess.DEVNULL)
"""
    with other_process(HOLD.format(more=more), tmp_path) as process:
        process.kill()
        process.wait()
        hold_output_dir(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"waiting for process {process.pid} on ")


def test_run_on_another_machine(tmp_path, monkeypatch, capsys):
    """This one waits, as the other machine may have crashed, and sends no signal."""
    monkeypatch.setattr(run_lock, "REMOTE_WAIT_SECONDS", 0.2)
    monkeypatch.setattr(run_lock, "LOCAL_WAIT_SECONDS", 60.0)
    with other_process(HOLD.format(more=""), tmp_path) as process:
        holder = Holder.read(tmp_path / LOCK_FILE)
        gone = Process(2**22 + 1, 0.0, "node7", "another boot")
        remote = replace(holder.process, host="node7", namespace="another boot")
        Holder(remote, launcher=gone).write(tmp_path / LOCK_FILE)
        with pytest.raises(UserError, match=f"in use by process {process.pid} on node7, started"):
            hold_output_dir(tmp_path)
        assert process.poll() is None
    assert "which still holds output_dir" in capsys.readouterr().out


def test_orphan_ends(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    more = """
def save(number, frame):
    time.sleep(0.5)
    open(sys.argv[1] + "/saved", "w").close()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
"""
    with orphan(folder, tmp_path, more) as pid:
        hold_output_dir(folder)
        assert (folder / "saved").exists()
        assert f"ending process {pid}, which still trains in {folder} although its launcher" in capsys.readouterr().out


def test_orphan_ignoring_signals(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "SAVE_SECONDS", 0.3)
    folder = tmp_path / "run"
    folder.mkdir()
    with orphan(folder, tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)") as pid:
        hold_output_dir(folder)
        assert not is_alive(pid)


@pytest.mark.slow
def test_rerun_after_killed_launcher(corpus, tokenizers, tmp_path, capsys):
    """`accelerate launch` is killed while its recipe trains; the recipe saves, and the same command resumes it."""
    options = {"train_tokens": 300 * 256, "save_strategy": "no"}
    whole, run = (
        recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / name, **options) for name in ("whole", "run")
    )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "ds_configs/single.yaml"]
    command = [*launcher, "recipes/pretrain_clm.py", *run]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as process:
        assert any(line.startswith("step") for line in process.stdout)
        pid = Holder.read(tmp_path / "run" / LOCK_FILE).process.pid
        process.kill()
        process.wait()
        run_recipe("pretrain_clm", run)
        assert not is_alive(pid)
    assert "resuming from" in capsys.readouterr().out
    run_recipe("pretrain_clm", whole)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_run_outliving_its_shell(tmp_path):
    """As with `nohup`: a shell is not a launcher."""
    folder = tmp_path / "run"
    folder.mkdir()
    with orphan(folder, tmp_path, launcher="shell") as pid:
        with pytest.raises(UserError, match=f"in use by process {pid} on"):
            hold_output_dir(folder)
        assert is_alive(pid)


def test_reused_process_id():
    process = Process.from_pid(os.getpid())
    assert process.is_running and not replace(process, started=process.started - 60).is_running
    assert not replace(process, namespace="another").is_running


# --- Prepared text ----------------------------------------------------------------------------------------------------


def test_prepared_bytes_are_reproducible(corpus, tokenizers, tmp_path):
    """The hash of the rows is a part of the identity of a run."""
    tokenizer = load_tokenizer(tokenizers["clm"])
    sources = [Source(corpus["train"])], [Source(corpus["validation"])]
    manifests = []
    for name in ("first", "second"):
        folder = prepare(*sources, tokenizer, "clm", 32, str(tmp_path / name))
        manifests.append(load_prepared(folder)[1])
    assert manifests[0]["sha256"] == manifests[1]["sha256"]
    assert set(manifests[0]["sha256"]) == {"train", "validation"}


def test_manifest_updated_by_two_processes(corpus, tokenizers, tmp_path, monkeypatch):
    """The second process waits for the first, as both use the same temporary file."""
    tokenizer = load_tokenizer(tokenizers["clm"])
    folder = prepare([Source(corpus["train"])], [Source(corpus["validation"])], tokenizer, "clm", 32, str(tmp_path))
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(corpus["train"]).read_bytes())
    arguments = [Source(str(moved))], [Source(corpus["validation"])], tokenizer, "clm", 32, str(tmp_path)
    with folder_lock(folder):
        thread = threading.Thread(target=prepare, args=arguments)
        thread.start()
        thread.join(timeout=1)
        assert thread.is_alive()
        assert load_prepared(folder)[1]["sources"][0]["path"] == corpus["train"]
    thread.join()
    assert load_prepared(folder)[1]["sources"][0]["path"] == str(moved)


def test_unique_staging_names(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    names = set()
    for _ in range(2):
        with pytest.raises(KeyError), staging.staged_folder(tmp_path / "data") as staged:
            names.add(staged.name)
            raise KeyError
    assert len(names) == 2

"""The same jobs give the same results in this process, in processes, through Ray, and through a Slurm array; so do whole curations."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import charforgex
from charforgex.curation import cutting
from charforgex.curation.executors import ExecutorSettings, get_executor
from charforgex.data.mess import write_archive, write_mess
from charforgex.errors import CharForgeError, ConfigError, DataError

ENTRY = "tests.curation.test_executors:double"


def double(job):
    if job["number"] < 0:
        raise DataError(f"{job['number']} is below zero.")
    return {"twice": 2 * job["number"], "process": os.getpid()}


def die(job):
    if job["number"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def linger(job):
    Path(job["told"], str(os.getpid())).touch()
    time.sleep(job["seconds"])


def results(executor, count=7):
    found = dict(executor.map(ENTRY, [{"number": number} for number in range(count)]))
    assert [found[number]["twice"] for number in range(count)] == [2 * number for number in range(count)]
    return {value["process"] for value in found.values()}


def test_one_worker_is_this_process():
    assert results(get_executor(ExecutorSettings(workers=1))) == {os.getpid()}


def test_processes_and_their_errors(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    executor = get_executor(ExecutorSettings(workers=2))
    assert os.getpid() not in results(executor)
    with pytest.raises(DataError, match="-1 is below zero"):
        list(executor.map(ENTRY, [{"number": 1}, {"number": -1}, {"number": 2}]))
    assert list(executor.map(ENTRY, [])) == []


def test_a_worker_that_dies_is_told(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    executor = get_executor(ExecutorSettings(workers=2))
    with pytest.raises(CharForgeError, match=r"A worker died .* memory .* fewer than curation\.workers=2"):
        list(executor.map("tests.curation.test_executors:die", [{"number": number} for number in range(9)]))


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")
def test_workers_of_a_killed_run_end(tmp_path):
    jobs = [{"told": str(tmp_path), "seconds": 100}] * 4
    code = (
        "from charforgex.curation.executors import Local;"
        f"list(Local(2).map('tests.curation.test_executors:linger', {jobs!r}))"
    )  # fmt: skip
    run = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])})
    deadline = time.monotonic() + 60
    while len(workers := [int(path.name) for path in tmp_path.iterdir()]) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) == 2 and all(map(running, workers))
    run.kill()
    run.wait()
    while any(map(running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(running, workers))


SCRIPT = """
import pathlib, sys
print("the script runs")
from charforgex.curation.executors import Local
list(Local(2).map("tests.curation.test_executors:double", [{"number": number} for number in range(5)]))
main = sys.modules["__main__"]
assert pathlib.Path(main.__file__).name == "plain.py" and main.__spec__ is None, "what was hidden is there again"
"""


def test_a_script_without_a_guard_runs_once(tmp_path):
    (tmp_path / "plain.py").write_text(SCRIPT)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    run = subprocess.run([sys.executable, str(tmp_path / "plain.py")], env=env, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("the script runs") == 1


@pytest.fixture(scope="module")
def ray():
    """A Ray of this machine's own, begun by the first test that asks for one."""
    ray = pytest.importorskip("ray", reason="Ray is an extra: pip install charforgex[ray]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        yield ray
        ray.shutdown()


def test_ray(ray):
    executor = get_executor(ExecutorSettings(kind="ray", workers=2))
    assert os.getpid() not in results(executor)
    with pytest.raises(DataError, match="-1 is below zero"):
        list(executor.map(ENTRY, [{"number": -1}]))


SBATCH = """#!{python}
import re, subprocess, sys
script = sys.argv[-1]
assert sys.argv[1] == "--wait"
text = open(script).read()
assert "#SBATCH --partition=cpu" in text
last = int(re.search(r"--array=0-(\\d+)", text).group(1))
for task in range({first}, last + 1):
    subprocess.run(["bash", script], check=True, env={{**__import__("os").environ, "SLURM_ARRAY_TASK_ID": str(task)}})
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """An `sbatch` that runs the array's tasks here, one after the other."""

    def install(first=0):
        path = tmp_path / "bin/sbatch"
        path.parent.mkdir(exist_ok=True)
        path.write_text(SBATCH.format(python=sys.executable, first=first))
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path.cwd()), *sys.path]))
        return get_executor(ExecutorSettings(kind="slurm", workers=3, sbatch=("--partition=cpu",), folder=tmp_path))

    return install


def test_a_slurm_array(slurm, tmp_path):
    assert len(results(slurm())) == 3, "one process a task"
    assert [path.name for path in tmp_path.iterdir()] == ["bin"], "its jobs are cleared away"


def test_a_task_that_never_ran_is_told(slurm):
    with pytest.raises(CharForgeError, match="left 3 of 7 shards undone"):
        results(slurm(first=1))


def test_where_there_is_no_slurm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch"):
        get_executor(ExecutorSettings(kind="slurm"))


def test_options_of_another_executor_are_refused():
    with pytest.raises(ConfigError, match="executor=ray"):
        ExecutorSettings(address="auto")
    with pytest.raises(ConfigError, match="executor=slurm"):
        ExecutorSettings(sbatch=("--partition=cpu",))


# ---- whole curations ----

SMALL = {"quality": {"min_side": 64, "min_detail_side": None}, "crops": {"min_side": 64, "framings": ["full"]}, "shard": 3}


@pytest.fixture(scope="module")
def mess(tmp_path_factory):
    """(folder of pictures and an archive, the dataset's hash as this process alone makes it)."""
    folder = tmp_path_factory.mktemp("mess")
    write_mess(folder / "raw", 0, {"kept": 4, "recompressed": 1, "empty": 1}, 96)
    write_archive(folder / "raw/pack.zip", 0, 1, 96)
    return folder / "raw", curate(folder / "raw", folder, workers=1)


def told(raw, folder, **curation):
    return {"data": {"root": str(raw)}, "runs_dir": str(folder / "runs"), "out": str(folder / "out"), "curation": SMALL | curation}


def curate(raw, folder, **curation):
    result = charforgex.curate(**told(raw, folder, **curation))
    assert result["classes"]["kept"] == 5
    return result["content"]


def test_a_plain_script_curates_with_processes(mess, tmp_path):
    """Without a guard for `__main__`, as people write them."""
    script = f"import charforgex; print('content', charforgex.curate(**{told(mess[0], tmp_path, workers=2)!r})['content'])"
    (tmp_path / "plain.py").write_text(script)
    run = subprocess.run([sys.executable, str(tmp_path / "plain.py")], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("content") == 1 and f"content {mess[1]}" in run.stdout


def test_ray_curates(ray, mess, tmp_path):
    assert curate(mess[0], tmp_path, executor="ray", workers=2) == mess[1]


def test_a_slurm_array_curates(mess, tmp_path, slurm):
    slurm()
    assert curate(mess[0], tmp_path, executor="slurm", workers=2, sbatch=["--partition=cpu"]) == mess[1]


SLOWLY = """
import time, charforgex
from charforgex.curation import cutting
save = cutting._save
cutting._save = lambda *args: (time.sleep(0.2), save(*args))[1]
charforgex.curate(**{told!r})
"""


def test_killed_while_it_cuts_it_goes_on(mess, tmp_path):
    code = SLOWLY.format(told=told(mess[0], tmp_path, workers=1))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    store, deadline = tmp_path / "runs/cache" / cutting.FOLDER, time.monotonic() + 120
    while not (memos := list(store.glob("[0-9a-f]*.json"))) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    rows = [row for memo in memos for known in json.loads(memo.read_text()).values() for row in known["rows"]]
    done = {path: path.stat().st_mtime_ns for row in rows for path in (tmp_path / "out/pictures" / row["file"],)}
    assert 1 <= len(done) < 5 and not (tmp_path / "out/result.json").exists(), "it was killed between two shards"
    assert curate(mess[0], tmp_path, workers=1) == mess[1]
    assert {path: path.stat().st_mtime_ns for path in done} == done, "what was cut is not cut again"

"""The entry points as a user meets them: exit codes, one line for what can be mended, Hydra's flags, no stray folders."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from charforgex import cli
from tests import small_conf

ROOT = Path(__file__).parents[1]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Runs the small job in-process, from an empty folder: returns its exit code."""
    monkeypatch.syspath_prepend(tmp_path / "project")
    folder = small_conf.write(tmp_path / "project")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return lambda *arguments: cli.guarded("small_job:job", "train", list(arguments), "train.py", folder)


def strays():
    return sorted(str(path.relative_to(Path.cwd())) for path in Path.cwd().rglob("*"))


def test_a_run_calls_the_job_and_leaves_no_folder_of_hydras(small, capsys):
    arguments, environment = list(sys.argv), dict(os.environ)
    assert small("experiment=flux", "data.folder=x", "lora.rank=3") == 0
    assert capsys.readouterr().out.startswith("RAN flux 3 7")
    assert strays() == []
    assert sys.argv == arguments and dict(os.environ) == environment


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["lora.rnk=3"], "ConfigError: lora.rnk is unknown; did you mean lora.rank?\n"),
        ([], "ConfigError: some settings have no value yet; add to the command: data.folder=... family.source=...\n"),
        ([*small_conf.WHOLE, "seed=1"], "DataError: no pictures in here\n"),
        (["--resolve"], "ConfigError: The --resolve flag can only be used in conjunction with --cfg or --help\n"),
        (["--config-dir", "nowhere"], None),
        (["--config-name", "trian"], "ConfigError: Cannot find primary config 'trian'. Check that it's in your config search path.\n"),
    ],
)
def test_what_can_be_mended_is_one_line_and_exit_code_2(small, capsys, arguments, line):
    assert small(*arguments) == 2
    error = capsys.readouterr().err
    assert error == line if line else "nowhere' not found" in error
    assert "Traceback" not in error and strays() == []


def test_debug_shows_the_traceback(small, capsys, monkeypatch):
    monkeypatch.setenv("CHARFORGEX_DEBUG", "1")
    assert small(*small_conf.WHOLE, "seed=1") == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and "small_job.py" in error and "DataError: no pictures" in error


def test_interruptions_and_exits_keep_their_codes(small):
    assert small(*small_conf.WHOLE, "seed=2") == 130
    with pytest.raises(SystemExit) as exited:
        small(*small_conf.WHOLE, "seed=4")
    assert exited.value.code == 143


def test_our_own_mistakes_stay_tracebacks(small):
    from omegaconf.errors import ConfigAttributeError

    with pytest.raises(ConfigAttributeError, match="rnk"):
        small(*small_conf.WHOLE, "seed=3")


def test_sweeps_run_each_job_and_keep_to_runs(small, capsys):
    assert small("-m", "lora.rank=2,4", "family=flux", "data.folder=x") == 0
    assert [line[:12] for line in capsys.readouterr().out.splitlines() if line.startswith("RAN")] == ["RAN flux 2 1", "RAN flux 4 1"]
    assert [path.split("/")[0] for path in strays()] == ["runs"] * 3  # the folder, the sweep's folder, multirun.yaml
    assert strays()[-1].endswith("multirun.yaml")


def test_a_sweep_file_is_found_and_swept(small, capsys):
    assert small("-m", "+sweeps=ranks", "family=flux", "data.folder=x") == 0
    assert capsys.readouterr().out.count("RAN flux") == 2


@pytest.mark.parametrize("wrong", ["lora.rnk=2,4", "family=flux,fluxx", "+sweeps=rnks"])
def test_a_wrong_sweep_stops_before_its_first_job(small, capsys, wrong):
    assert small("-m", wrong, "data.folder=x") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("ConfigError: ") and "RAN" not in captured.out and strays() == []


def test_a_failing_job_of_a_sweep_is_told_at_once_and_fails_the_sweep(small, capsys):
    assert small("-m", "seed=1,0", *small_conf.WHOLE) == 2
    captured = capsys.readouterr()
    assert captured.out.count("RAN") == 2 and captured.err.startswith("DataError: no pictures in here\n")


def test_cfg_and_help_show_the_settings(small, capsys):
    assert small("--cfg", "job", "lora.rank=5") == 0
    assert "rank: 5" in capsys.readouterr().out
    assert small("--help", "lora=large") == 0
    text = capsys.readouterr().out
    assert "usage: train.py [name=value ...]" in text and "  lora: large, standard\n" in text and "    rank: 64\n" in text
    assert small("--help", "lora=huge") == 2
    assert strays() == []


def test_a_users_own_folder_of_presets_comes_first(small, capsys, tmp_path):
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\nsteps: 9\n")
    (own / "typo.yaml").write_text("# @package _global_\nstpes: 9\n")
    assert small("--config-dir", str(own.parent), "experiment=mine", *small_conf.WHOLE) == 0
    assert "RAN sdxl 16 9" in capsys.readouterr().out
    assert small("--config-dir", str(own.parent), "experiment=typo", *small_conf.WHOLE) == 2
    assert small("--config-dir", str(own.parent), "experiment=min", *small_conf.WHOLE) == 2
    assert "did you mean mine?" in capsys.readouterr().err


def test_red_only_on_a_terminal(capsys, monkeypatch):
    cli.complain(cli.ConfigError("x"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cli.complain(cli.ConfigError("x"))
    monkeypatch.setenv("NO_COLOR", "1")
    cli.complain(cli.ConfigError("x"))
    assert capsys.readouterr().err == "ConfigError: x\n\033[31mConfigError: x\033[0m\nConfigError: x\n"


def test_the_console_script_knows_its_commands(capsys):
    for arguments, code, said in (
        ([], 0, "train"),
        (["--help"], 0, "generate"),
        (["--version"], 0, "charforgex "),
        (["trian"], 2, "did you mean train?"),
    ):
        with pytest.raises(SystemExit) as exited:
            cli.main(arguments)
        captured = capsys.readouterr()
        assert exited.value.code == code and said in captured.out + captured.err


def test_curate_report_only_looks(monkeypatch):
    called = []
    monkeypatch.setattr(cli, "run", lambda command, arguments: called.append((command, arguments)))
    cli.main(["curate", "report", "data.root=x"])
    cli.main(["curate", "data.root=report"])
    assert called == [("curate", ["only_report=true", "data.root=x"]), ("curate", ["data.root=report"])]


@pytest.mark.parametrize("command", [["curate.py"], ["charforgex", "curate"]])
def test_curate_clips_is_a_command_of_its_own(command, monkeypatch):
    called = []
    monkeypatch.setattr(cli, "guarded", lambda *told: called.append(told[:3]) or 0)
    monkeypatch.setattr(sys, "argv", [*command, "clips", "data.root=x"])
    with pytest.raises(SystemExit):
        cli.run("curate") if command == ["curate.py"] else cli.main()
    assert called == [(cli.CURATE_CLIPS, "curate_clips", ["data.root=x"])]


@pytest.mark.parametrize("command", [path.stem for path in sorted(ROOT.glob("*.py"))])
def test_scripts_and_console_script_are_the_same_program(command, tmp_path):
    """From another folder, with an unknown setting: the same answer, and nothing heavy was imported for it."""
    script = [sys.executable, ROOT / f"{command}.py"]
    console = [sys.executable, "-c", "from charforgex.cli import main; main()", command]
    answers = [
        subprocess.run([*program, "no_such_setting=1"], cwd=tmp_path, capture_output=True, text=True) for program in (script, console)
    ]
    assert [answer.returncode for answer in answers] == [2, 2]
    assert answers[0].stderr == answers[1].stderr
    assert answers[0].stderr.startswith("ConfigError: no_such_setting is unknown") and len(answers[0].stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("unbuffered", ["", "1"])  # a short text breaks the pipe at the interpreter's exit, or at once
def test_help_into_a_closed_pipe_is_no_failure(tmp_path, unbuffered):
    process = subprocess.Popen(
        [sys.executable, ROOT / "generate.py", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


@pytest.mark.parametrize(
    "typed, meant",
    [
        (["a.safetensors", "rank=8"], ["lora=a.safetensors", "rank=8"]),
        (["a.safetensors", "b c.safetensors", "--dry-run"], ["lora=[a.safetensors,'b c.safetensors']", "dry_run=true"]),
        (
            ["-m", "weights=[1,0],[0,1]", "a.safetensors", "b.safetensors"],
            ["lora=[a.safetensors,b.safetensors]", "-m", "weights=[1,0],[0,1]"],
        ),
        (["~hydra.x", "~/a.safetensors"], ["lora='~/a.safetensors'", "~hydra.x"]),
        (["lora=a.safetensors", "out=b.safetensors"], ["lora=a.safetensors", "out=b.safetensors"]),
        (["--help"], ["--help"]),
    ],
)
def test_files_that_stand_alone_are_the_loras(typed, meant):
    assert cli.with_files(typed) == meant


@pytest.mark.parametrize(
    "typed, meant",
    [
        (["a=1", "-m", "b=2,3", "--cfg", "job", "~c"], ["a=1", "b=2,3", "~c", "-m", "--cfg", "job"]),
        (["-m", "a=1"], ["a=1", "-m"]),
        (["--config-dir", "~/conf", "--config-name=x", "--help"], ["--config-dir", "~/conf", "--config-name=x", "--help"]),
    ],
)
def test_settings_may_stand_on_both_sides_of_a_flag(typed, meant):
    assert cli.settings_first(typed) == meant


def test_a_sweep_whose_flag_stands_between_settings(small, capsys):
    assert small("data.folder=x", "-m", "lora.rank=2,4", "family=flux") == 0
    assert capsys.readouterr().out.count("RAN flux") == 2


def test_commands_that_run_others_do_so_from_the_command_line(tmp_path):
    """`bench` and `ablate` compose configs of train.py and evaluate.py while Hydra runs them."""
    done = subprocess.run(
        [sys.executable, "-c", "from charforgex.cli import main; main()", "bench", "characters", "settings=lora.rnak=4"], cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("ConfigError: lora.rnak is unknown")

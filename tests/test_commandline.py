"""What is wrong with a command line is one line, and Ctrl-C comes where it does no harm."""
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ssl_gpu.commandline import Parser, bar_interval, begin_command, end_with, told, uninterrupted


@pytest.mark.parametrize("words, problem", [
    ([], "the following arguments are required: config"),
    (["a.yaml", "x.y=1", "--nope"], "unrecognized arguments: --nope"),
    (["a.yaml", "--number", "x"], "argument --number: invalid int value: 'x'"),
])
def test_a_wrong_command_line_is_one_line(words, problem, capsys):
    parser = Parser(prog="python -m ssl_gpu.x", description="One line.\nAnother.")
    parser.add_argument("config")
    parser.add_argument("--number", type=int)
    parser.add_overrides("for example x.y=2")
    with pytest.raises(SystemExit) as end:
        parser.parse_intermixed_args(words)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {problem}; options are listed by python -m ssl_gpu.x --help\n"
    assert "One line.\nAnother." in parser.format_help()                 # as it is
    assert parser.parse_intermixed_args(["x.yaml"]).overrides == []
    assert parser.parse_intermixed_args(["x.yaml", "a.b=1", "--number", "3", "c.d=2"]).overrides == ["a.b=1", "c.d=2"]


@pytest.fixture
def heard():
    """Ctrl-C raises, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_command_that_begins_is_ended_at_once_and_then_by_a_line(heard, monkeypatch, capsys):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    begin_command()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL and os.environ["OMP_WAIT_POLICY"] == "active"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    begin_command()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    with pytest.raises(SystemExit) as end:
        end_with(lambda: signal.raise_signal(signal.SIGINT))
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted\n"
    signal.signal(signal.SIGINT, signal.SIG_IGN)                        # as nohup does, whose child is not to hear it
    begin_command()
    with pytest.raises(SystemExit) as end:
        end_with(lambda: signal.raise_signal(signal.SIGINT))
    assert end.value.code is None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("command", ["config", "evaluate", "fidelity", "localize", "pretrained", "simulate", "speech",
                                     "train"])
def test_ctrl_c_while_torch_is_loaded_is_no_traceback(command, tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    found = subprocess.run([sys.executable, "-c", "import runpy, signal; signal.signal(signal.SIGINT, "
                            f"signal.default_int_handler); runpy.run_module('ssl_gpu.{command}', run_name='__main__')"],
                           env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"},
                           capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (-signal.SIGINT, "")


def test_bars_are_seldom_written_to_a_file(monkeypatch):
    for terminal, expected in ((True, 0.1), (False, 10.0)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        assert bar_interval() == expected


def test_what_is_uninterrupted_is_done_as_a_whole(heard):
    before, done = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(1)
        done.append(2)
    assert done == [1] and signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ZeroDivisionError):                              # an error is told, whatever came before it
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            1 / 0
    assert signal.getsignal(signal.SIGINT) is before

    def elsewhere():                                                    # where no handler can be set
        with uninterrupted():
            done.append(3)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert done == [1, 3]


def test_commands_are_told_with_the_last_names_of_paths(tmp_path, monkeypatch):
    """Of those that are there, and of those that are not yet."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "speech").mkdir()
    words = [str(tmp_path / "a.yaml"), f"speech.eval={tmp_path / 'speech'}", "train.out=/home/someone/runs/first",
             "--json", "/home/someone/x.json", "rir.hybrid_share=0.5", "train.lr=1e-3", "--json=y",
             "--out", "/home/someone/lr=3/x"]
    assert told("ssl_gpu.train", words) == ("python -m ssl_gpu.train a.yaml speech.eval=speech train.out=first "
                                            "rir.hybrid_share=0.5 train.lr=1e-3 --out x")

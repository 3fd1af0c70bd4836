"""Prints do not fail without a reader, or when the encoding lacks a character. No other error is hidden."""

import io
import json
import os
import select
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers import (
    ROOT,
    SLOW_STEPS,
    TIME_LIMIT,
    corpus_from,
    patched_script,
    result,
    run,
    run_as_user,
    small_flags,
    start,
    wait_for_checkpoint,
    wait_until,
)

from microbert.config.terminal import flush_or_discard, safe_output

PRINTS = """import sys
from microbert.config.terminal import safe_output
with safe_output():
    sys.stdin.readline()  # until the reader is gone
    for _ in range(20_000):
        print("more than a pipe holds")
        print("and this", file=sys.stderr)
open(sys.argv[1], "w").write("done")
"""


def writable(kind):
    """Return a writable descriptor of a pipe or a terminal, and a function that closes its reader."""
    read, write = os.pipe() if kind == "pipe" else os.openpty()
    return write, lambda: os.close(read)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no terminals of that kind")
@pytest.mark.parametrize("kind", ["pipe", "terminal"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_process_continues_when_its_reader_is_gone(stream, kind, tmp_path):
    descriptor, leave = writable(kind)
    other = "stderr" if stream == "stdout" else "stdout"
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTS, str(tmp_path / "end")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        text=True,
        **{stream: descriptor, other: subprocess.PIPE},
    )
    os.close(descriptor)
    leave()
    output = "".join(filter(None, process.communicate("go\n", timeout=TIME_LIMIT)))
    assert process.returncode == 0 and (tmp_path / "end").read_text() == "done"
    assert output.count("\n") == 20_000  # the other stream is complete, without a message about this one


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
def test_another_error_is_raised(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINTS, str(tmp_path / "end")],
            cwd=ROOT,
            input="go",
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode and "No space left" in done.stderr and not (tmp_path / "end").exists()


def test_the_streams_are_restored():
    before = sys.stdout, sys.stderr
    with safe_output():
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["1", ""])
@pytest.mark.parametrize(
    "flags", [["-m", "microbert.advise"], ["mlm_pretrain_v1.py", "--dry-run"]], ids=lambda flags: flags[-1]
)
def test_a_closed_pipe_leaves_no_traceback(flags, unbuffered):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_streams_of_any_type_are_accepted(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as if it was closed before the start
    monkeypatch.setattr(sys, "stderr", text := io.StringIO())
    with safe_output():
        print("lost")
        sys.stderr.writelines(["all", " lines"])
    assert text.getvalue() == "all lines"


THAI, HARD = "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\u2588 \udce9 \U0001f600"


@pytest.mark.parametrize(
    "encoding", ["ascii", "latin-1", "cp1252", "cp437", "cp874", "shift_jis", "koi8-r", "utf-16", "utf-8"]
)
def test_characters_that_the_encoding_lacks_are_escaped(encoding, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding))
    with safe_output():
        print("before", THAI, HARD)
        sys.stderr.writelines([THAI, HARD])
    out, errors = (stream.buffer.getvalue().decode(encoding) for stream in (sys.stdout, sys.stderr))
    assert out.startswith("before ") and out.endswith("\n") and "\\udce9" in out and "\\udce9" in errors
    assert (THAI in out) == (encoding in ("cp874", "utf-16", "utf-8"))
    with pytest.raises(UnicodeEncodeError):
        print(HARD)  # the stream itself is unchanged


class Bare:
    """A stream of some library, which encodes to ASCII and has no `encoding`."""

    def __init__(self):
        self.written = ""

    def write(self, text):
        self.written += text.encode("ascii").decode()

    def flush(self):
        pass


def test_a_stream_without_an_encoding_gets_ascii(monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream := Bare())
    with safe_output():
        print(THAI)
    assert stream.written == THAI.encode("ascii", "backslashreplace").decode() + "\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
def test_output_that_cannot_be_written_can_be_discarded(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with safe_output():
            print("lost")
            flush_or_discard()
        full.flush()  # does not raise


IN_ASCII = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "cp1252:strict"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


@pytest.mark.parametrize("variables", IN_ASCII, ids=lambda variables: "-".join(variables.values()))
@pytest.mark.parametrize(
    "command, code", [(["mlm_pretrain_v4.py", "--help"], 0), (["mlm_pretrain_v1.py", "--dataset", f"{THAI}.txt"], 2)]
)
def test_help_and_errors_are_printed_in_any_encoding(command, code, variables):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env={**os.environ, **variables}, capture_output=True)
    assert done.returncode == code and b"Traceback" not in done.stderr
    assert (b"accents" in done.stdout) == (code == 0)


def test_a_command_prints_in_any_encoding(finished_run):
    """Tested with fill_mask, for all commands."""
    command = [sys.executable, "-m", "microbert.fill_mask", str(finished_run / "run"), f"the {THAI} was [MASK]"]
    variables = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and "\\u0e2a" in done.stdout and done.stdout.count("%") == 5


@pytest.mark.fault(row=33)
@pytest.mark.slow
def test_a_run_on_thai_text_succeeds_whatever_the_log_can_encode(tmp_path):
    corpus = tmp_path / f"{THAI}.txt"
    lines = (f"{THAI}{chr(0xE01 + number % 40)} {THAI} {number}\n" for number in range(100))
    corpus.write_text("".join(lines), encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = run_as_user(small_flags(tmp_path, dataset=corpus, epochs=1), env=environment)
    assert done.returncode == 0, done.stderr
    assert "\\u0e2a" in done.stdout and "[MASK]" in done.stdout and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"


STALLED = """import signal, sys, types
from microbert.config.terminal import safe_output
from microbert.runtime.run import Run
run = Run(None, None, types.SimpleNamespace(is_first=True))
signal.signal(signal.SIGINT, lambda *_: run.note_stop("SIGINT"))
with safe_output():
    while True:
        print("x" * 1000, file=sys.stderr)
        if run.stop_signal:
            sys.exit(75)
"""


def test_a_signal_during_a_print_that_waits_for_its_reader_stops_the_run(tmp_path):
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", STALLED], cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": ""}, stderr=write
    )
    os.close(write)
    wait_until(
        lambda: psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING and select.select([read], [], [], 0)[0],
        process,
    )
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)  # the handler prints now
    os.close(read)
    assert process.wait(TIME_LIMIT) == 75


@pytest.mark.fault(row=4)
@pytest.mark.slow
def test_a_ctrl_c_that_ends_tee_too_saves_and_exits_75(finished_run, reference, tmp_path):
    corpus_from(finished_run, tmp_path)
    flags = small_flags(tmp_path)
    read, write = os.pipe()  # 2>&1 | tee log
    process = subprocess.Popen(
        [sys.executable, str(patched_script(tmp_path / "slow.py", SLOW_STEPS)), *flags], stdout=write, stderr=write
    )
    os.close(write)
    wait_for_checkpoint(process, tmp_path / "run")
    os.close(read)
    process.send_signal(signal.SIGINT)
    assert process.wait(TIME_LIMIT) == 75
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    assert run(flags).returncode == 0
    assert result(tmp_path / "run") == reference


@pytest.mark.fault(row=4)
@pytest.mark.slow
def test_a_run_whose_output_is_closed_finishes(finished_run, reference, tmp_path):
    corpus_from(finished_run, tmp_path)
    process = start(small_flags(tmp_path))
    process.stdout.close()
    process.stderr.close()
    assert process.wait(TIME_LIMIT) == 0
    assert result(tmp_path / "run") == reference

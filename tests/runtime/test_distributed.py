"""Processes that wait for each other can be stopped, and on one machine they do not listen on the network."""

import os
import signal
import socket
import threading
import time

import psutil
import pytest
import torch
import torch.distributed as dist
from helpers import end_of, end_tree, fork, small_flags, wait_until
from launches import faulty_script, finish, flags_of, free_port, ranks, start, wait_for_training

import microbert.runtime.distributed
from microbert.errors import InputError, Stopped
from microbert.runtime.distributed import World
from microbert.runtime.stopping import TRAIN
from microbert.runtime.store import Store, is_loopback, loopback_store

SOON = 20  # seconds to stop in, enough on a busy machine; processes wait for each other up to 300


def raise_stopped():
    raise Stopped("stopped")


def test_a_group_that_does_not_form_is_abandoned_when_this_process_was_asked_to_stop(monkeypatch):
    held = threading.Event()
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: held.wait())
    monkeypatch.setattr(microbert.runtime.distributed, "ANSWER_SECONDS", 0.1)
    world = World({"WORLD_SIZE": "2", "RANK": "1"})
    world._store = world.stopping.store = Store(loopback_store())
    world._store.set("phase", TRAIN)
    world._give_up = raise_stopped
    with pytest.raises(Stopped):
        world.form_group(torch.device("cpu"), 600)
    held.set()


def meet_marked(environment, mark):
    """Patch a process that will run the script: it meets in this environment, and creates the file `mark` then."""
    os.environ.update(environment)
    real = World.meet

    def meet(*arguments):
        open(mark, "w").close()
        real(*arguments)

    World.meet = meet


@pytest.mark.fault(row=5)
@pytest.mark.parametrize(
    "rank, host, is_silent",
    [(0, "127.0.0.1", False), (1, "127.0.0.1", False), (1, "127.0.0.1", True), (1, "no.such.host.invalid", False)],
)
def test_sigterm_while_processes_meet_ends_soon_with_75(rank, host, is_silent, tmp_path):
    """Rank 0 waits for rank 1. Rank 1 finds no store, or one that never answers, or cannot resolve its host name."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1] if is_silent else free_port()
        environment = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": str(port)}
        process = fork(small_flags(tmp_path), tmp_path / "log", meet_marked, environment, str(tmp_path / "mark"))
        deadline = time.monotonic() + 60
        while not (tmp_path / "mark").exists():
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)  # so that it waits
        os.kill(process.pid, signal.SIGTERM)
        assert end_of(process, SOON) == 75
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    "environment, message",
    [
        ({}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "70000"}, "'70000' is not a port"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "taken"}, "cannot be used"),
    ],
)
def test_an_invalid_address_of_the_store_is_reported(environment, message, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for name, value in environment.items():
            monkeypatch.setenv(name, value.replace("taken", str(taken.getsockname()[1])))
        with pytest.raises(InputError, match=message):
            World({"WORLD_SIZE": "2"}).meet()


@pytest.mark.fault(row=5)
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf=is_host=0"),
        ("--node-rank=1", "--master-port={port}"),
    ],
)
def test_sigterm_while_machines_meet_ends_soon_with_75(options, tmp_path):
    """The second machine waits for the first, which does not start."""
    options = [
        "--nnodes=2",
        *(option.format(port=free_port()) for option in options),
        "--log-dir",
        str(tmp_path / "logs"),
    ]
    process = start(flags_of(tmp_path, 2), 1, *options)
    try:
        wait_until(
            lambda: (
                psutil.Process(process.pid).num_threads() > 1 and "pt_elastic" in psutil.Process(process.pid).name()
            ),
            process,
        )  # torchrun renames its process
        time.sleep(1.0)
        process.terminate()
        code, _, errors = finish(process, SOON)
    finally:
        end_tree(process)
    assert code == 75 and errors == "stopped by SIGTERM before the run began\n"


@pytest.mark.fault(row=5)
@pytest.mark.slow
def test_sigterm_to_torchrun_while_its_processes_meet_ends_soon_with_75(tmp_path):
    script = faulty_script(
        tmp_path / "late.py",
        f"""if rank == 1:
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    open({str(tmp_path / "mark")!r}, "w")
    time.sleep(1000)""",
    )
    process = start(flags_of(tmp_path, 2), script=script)
    wait_until((tmp_path / "mark").exists, process)
    workers = ranks(process)
    wait_until(lambda: any(connection.status == "ESTABLISHED" for connection in workers[0].net_connections()), process)
    process.terminate()
    code, _, errors = finish(process, SOON)
    assert code == 75 and "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [(), ("--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")],
    ids=["standalone", "endpoint"],
)
def test_on_one_machine_nothing_listens_on_the_network(options, tmp_path):
    process = start(flags_of(tmp_path, 2, epochs=200), 2, *options)
    try:
        wait_for_training(process, tmp_path / "run")
        processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        connections = [connection for each in processes for connection in each.net_connections()]
        listening = [connection.laddr.ip for connection in connections if connection.status == "LISTEN"]
    finally:
        end_tree(process)
        process.communicate()
    assert len(listening) >= 3  # torchrun's store, and gloo in each process
    assert all(is_loopback(address) for address in listening)


def test_standalone_on_several_machines_is_refused(tmp_path):
    process = start(flags_of(tmp_path, 2), 2, "--nnodes=2", "--standalone")
    code, _, errors = finish(process)
    assert code == 2 and errors.startswith("error: --standalone is for one machine") and errors.count("\n") == 1

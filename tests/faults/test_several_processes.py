"""Several processes train as one process does, and end together: nothing is lost or left running."""

import concurrent.futures
import json
import os
import random
import re
import shutil
import signal
import socket

import numpy as np
import pytest
import torch
from configs import configure
from helpers import SLOW_STEPS, TIME_LIMIT, end_tree, patched_script, result, run, wait_for_checkpoint, wait_until
from launches import (
    FOREVER,
    SCRIPT,
    all_gone,
    faulty_script,
    finish,
    flags_of,
    free_port,
    launch,
    ranks,
    start,
    status,
    wait_for_training,
)
from models import VOCAB_SIZE, as_batch, as_sequences, noisy_model, token_rows
from safetensors.torch import load_file

from microbert.data.batches import steps_in_run, training_batch
from microbert.data.masking import mask_batch
from microbert.runtime.distributed import World
from microbert.train.step import Learner


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Return a folder with a small corpus and an uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    code, out, err = launch(flags_of(folder, 2, keep_checkpoints=100), 2)
    assert code == 0, err
    return folder


@pytest.fixture(scope="module")
def one(two, tmp_path_factory):
    """Return the same for one process, started by the same command without torchrun."""
    folder = tmp_path_factory.mktemp("one")
    copy_prepared(two, folder)
    done = run(flags_of(folder, 1), SCRIPT)
    assert done.returncode == 0, done.stderr
    return folder


def copy_prepared(finished, folder):
    """Copy the corpus and the prepared tokens of a finished run for another run."""
    shutil.copy(finished / "corpus.jsonl", folder)
    shutil.copytree(finished / "cache", folder / "cache")


def assert_weights_close(folder, other, atol=2e-4):
    """Compare runs that sum in a different order. Adam's first steps amplify the rounding errors of fp32."""
    weights, others = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    for name, weight in weights.items():
        torch.testing.assert_close(
            weight, others[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def losses(folder, key="eval/loss"):
    return [line[key] for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if key in line]


def test_two_processes_train_like_one(two, one):
    assert losses(two / "run") == pytest.approx(losses(one / "run"), abs=1e-4)
    assert losses(two / "run", "train/loss") == pytest.approx(losses(one / "run", "train/loss"), abs=1e-4)
    assert_weights_close(two / "run", one / "run")
    assert status(two / "run")["exit_code"] == 0


@pytest.mark.slow
def test_the_reported_memory_is_the_most_of_any_process(two, tmp_path):
    copy_prepared(two, tmp_path)
    code, out, err = launch(
        flags_of(tmp_path, 2), 2, script=faulty_script(tmp_path / "holds.py", "ballast = b'1' * (10**9 * rank)")
    )
    assert code == 0, err
    at_the_end = re.search(r"; memory: at most (\S+) GB in any process$", out, re.MULTILINE)
    assert (
        max(losses(two / "run", "train/peak_memory_gb"))
        < 1
        < min([float(at_the_end[1]), *losses(tmp_path / "run", "train/peak_memory_gb")])
    )


def gradients(rank, size, port, micro_batch_size):
    """Return the step's numbers, the gradients and the number of masked tokens of one process.

    It has its share of a batch of 32, with rows of very different lengths, so that the ranks' token counts differ.
    """
    world = World({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)})
    rows = token_rows(32)
    rows[20:, 3:] = 0
    rows[20:, 2] = 3
    mine = slice(rank * 32 // size, (rank + 1) * 32 // size)
    masked = mask_batch(
        as_batch(rows[mine], sequence_ids=np.arange(32)[mine]), seed=0, probability=0.3, vocab_size=VOCAB_SIZE
    )
    model = noisy_model(dropout=0.2)
    if size > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
        world.meet()
        world.form_group(torch.device("cpu"), 60)
    learner = Learner(model, configure(micro_batch_size=micro_batch_size, grad_clip=None, dropout=0.2), world)
    numbers = learner.step(masked, 0, 0.0).read()
    world.gather(0.0)  # rank 0 runs the store, and must not end first
    world.leave_group()
    return numbers, [parameter.grad.numpy().copy() for parameter in model.parameters()], masked.n_masked


@pytest.mark.slow
@pytest.mark.fault(row=17)
def test_one_process_of_32_four_micro_batches_of_8_and_two_processes_of_16_give_the_same_gradients():
    numbers, whole, n_masked = gradients(0, 1, None, None)
    assert numbers[1] > 0.01
    found = [gradients(0, 1, None, 8)]
    with concurrent.futures.ProcessPoolExecutor(2, torch.multiprocessing.get_context("spawn")) as pool:
        for micro_batch_size in (None, 8):
            port = free_port()
            of_first, _ = [pool.submit(gradients, rank, 2, port, micro_batch_size) for rank in range(2)]
            found.append(of_first.result(TIME_LIMIT))
            assert found[-1][2] > 0.6 * n_masked  # the processes have different numbers of masked tokens
    for others, parts, _ in found:
        np.testing.assert_allclose(others, numbers, rtol=1e-5)  # fp32 sums in another order, here and below
        for part, of_whole in zip(parts, whole, strict=True):
            np.testing.assert_allclose(part, of_whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "n_sequences, global_batch_size, world_size", [(271, 8, 2), (100, 12, 4), (7, 8, 2), (64, 8, 8)]
)
@pytest.mark.fault(row=16)
def test_sequences_that_do_not_divide_give_equal_steps_and_occur_once_per_epoch(
    n_sequences, global_batch_size, world_size
):
    sequences = as_sequences(token_rows(n_sequences))
    epochs, seen = 2, []
    for step in range(steps_in_run(n_sequences, epochs, global_batch_size)):
        for rank in range(world_size):
            batch = training_batch(
                sequences,
                step=step,
                epochs=epochs,
                global_batch_size=global_batch_size,
                seed=1,
                rank=rank,
                world_size=world_size,
            )
            assert len(batch.input_ids) == global_batch_size // world_size
            seen += list(zip(batch.epochs[batch.real], batch.sequence_ids[batch.real], strict=True))
    assert sorted(seen) == [(epoch, number) for epoch in range(epochs) for number in range(n_sequences)]


@pytest.mark.fault(row=5)
def test_sigterm_to_torchrun_saves_and_the_same_command_resumes_to_the_same_model(two, tmp_path):
    copy_prepared(two, tmp_path)
    flags = flags_of(tmp_path, 2)
    process = start(flags, script=patched_script(tmp_path / "slow.py", SLOW_STEPS, SCRIPT))
    workers = wait_for_training(process, tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)  # within 30 s, after which torchrun kills its processes
    assert code == 75, err
    assert all_gone(list(workers.values()), 1)
    assert "Traceback" not in err and err.count("stopped by SIGTERM") == 1
    assert (status(tmp_path / "run")["state"], status(tmp_path / "run")["exit_code"]) == ("stopped", 75)
    code, _, err = launch(flags)
    assert code == 0, err
    assert result(tmp_path / "run") == result(two / "run")


@pytest.mark.fault(row=5)
@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_without_a_restart(two, tmp_path):
    copy_prepared(two, tmp_path)
    process = start(
        flags_of(tmp_path, 2),
        2,
        "--max-restarts=1",
        module="torch.distributed.run",
        script=patched_script(tmp_path / "slow.py", SLOW_STEPS, SCRIPT),
    )
    wait_for_training(process, tmp_path / "run")[1].terminate()
    code, out, err = finish(process)
    assert code == 1  # of torchrun itself
    assert status(tmp_path / "run")["exit_code"] == 75
    assert "process 1 of 2" in status(tmp_path / "run")["reason"]
    assert out.count("training: ") == 1 and out.count("model: ") == 1


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.fault(row=10)
@pytest.mark.slow
def test_a_killed_process_ends_the_run_with_an_error(rank, two, tmp_path):
    copy_prepared(two, tmp_path)
    process = start(flags_of(tmp_path, 2, epochs=20), patience=FOREVER)
    workers = wait_for_training(process, tmp_path / "run")
    workers[rank].kill()
    code, out, err = finish(process, 60)  # seconds, enough on a busy machine
    assert code == 1
    assert all_gone(list(workers.values()), 1)
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1] == f"error: process {rank} was killed by SIGKILL"
    found = status(tmp_path / "run")
    assert (found["state"], found["exit_code"], found["rank"]) == ("failed", 1, 1 - rank)
    assert "step " in found["reason"]


@pytest.mark.slow
@pytest.mark.fault(row=11)
def test_a_restart_after_a_kill_ends_with_the_same_model(two, tmp_path):
    """With --overwrite, which must not remove the checkpoints of the first attempt."""
    copy_prepared(two, tmp_path)
    process = start(
        [*flags_of(tmp_path, 2), "--overwrite"],
        2,
        "--max-restarts=1",
        script=patched_script(tmp_path / "slow.py", SLOW_STEPS, SCRIPT),
    )
    wait_for_training(process, tmp_path / "run")[random.Random(1).choice((0, 1))].kill()
    code, out, err = finish(process)
    assert code == 0, err
    assert "resuming after step" in out
    assert result(tmp_path / "run") == result(two / "run")


@pytest.mark.fault(row=12)
@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run_after_the_time_limit_naming_the_step(two, tmp_path):
    copy_prepared(two, tmp_path)
    process = start(flags_of(tmp_path, 2, epochs=200, group_timeout=10), patience=3)
    workers = wait_for_training(process, tmp_path / "run")
    workers[1].suspend()
    code, out, err = finish(process, 90)  # seconds: ten of group_timeout, and time for a busy machine
    assert code == 1
    assert all_gone(list(workers.values()), 1)
    assert "Traceback" not in err and "does not answer" in err
    assert status(tmp_path / "run")["reason"].startswith("step ")


@pytest.mark.slow
@pytest.mark.fault(row=13)
def test_two_agents_as_two_machines_end_with_the_weights_of_one(two, tmp_path):
    """A process is killed on one of them, and both restart theirs."""
    copy_prepared(two, tmp_path)
    options = (
        "--nnodes=2",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{free_port()}",
        "--rdzv-id=pair",
        "--local-addr=127.0.0.1",
        "--max-restarts=1",
    )
    script = patched_script(tmp_path / "slow.py", SLOW_STEPS, SCRIPT)
    agents = [start([*flags_of(tmp_path, 2), "--overwrite"], 1, *options, script=script) for _ in range(2)]
    try:
        wait_for_checkpoint(agents[0], tmp_path / "run")
        {rank: worker for agent in agents for rank, worker in ranks(agent).items()}[
            1
        ].kill()  # the first process's torchrun counts no restart
        ends = [finish(agent) for agent in agents]
        assert [code for code, _, _ in ends] == [0, 0], ends
        assert any("resuming after step" in out for _, out, _ in ends)
    finally:
        for agent in agents:
            end_tree(agent)
    assert result(tmp_path / "run") == result(two / "run")


@pytest.mark.fault(row=14)
@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(two, one, tmp_path):
    """Saved on 2, resumed on 1 and on 4 by the same command: the global batch stays the same."""
    for n_processes in (1, 4):
        folder = tmp_path / str(n_processes)
        folder.mkdir()
        copy_prepared(two, folder)
        (folder / "run").mkdir()
        shutil.copytree(two / "run" / "checkpoint-60", folder / "run" / "checkpoint-60")
        shutil.copy(two / "run" / "metrics.jsonl", folder / "run")
        code, out, err = launch(flags_of(folder, 2), n_processes)
        assert code == 0, err
        assert "steps of 8 sequences" in out and "resuming after step 60" in out
        assert losses(folder / "run") == pytest.approx(losses(two / "run"), abs=1e-4)
        assert_weights_close(folder / "run", two / "run")

    # with four processes the order of summing gradients matters: resuming again must not change it
    expected = result(folder / "run")
    for path in (
        folder / "run" / "README.md",
        folder / "run" / "model.safetensors",
        folder / "run" / expected["checkpoint"],
    ):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, out, err = launch(flags_of(folder, 2), 4)
    assert code == 0 and "resuming after step 70" in out, err
    assert result(folder / "run") == expected


@pytest.mark.slow
@pytest.mark.fault(row=15)
def test_a_batch_that_the_processes_cannot_split_is_refused_before_training(two, tmp_path):
    copy_prepared(two, tmp_path)
    code, out, err = launch(flags_of(tmp_path, 1, global_batch_size=8), 3)
    assert code == 2
    assert err.strip() == (
        "error: process 0 of 3: "
        "global_batch_size = 8 cannot be shared equally by 3 processes: start a number that divides it"
    )
    assert status(tmp_path / "run")["exit_code"] == 2
    assert [path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")] == ["status.json"]


@pytest.mark.fault(row=18)
@pytest.mark.slow
def test_preparation_may_take_longer_than_group_timeout(two, tmp_path):
    shutil.copy(two / "corpus.jsonl", tmp_path)
    patch = """import microbert.data.prepare as prepare
real = prepare.prepare_tokens
def slow(*arguments):
    if rank == 0:
        time.sleep(18)
    return real(*arguments)
prepare.prepare_tokens = slow"""
    script = faulty_script(tmp_path / "slow.py", patch)
    code, out, err = launch(flags_of(tmp_path, 2, group_timeout=12), script=script, module="torch.distributed.run")
    assert code == 0, err
    assert result(tmp_path / "run") == result(two / "run")


@pytest.mark.slow
@pytest.mark.fault(row=18)
def test_preparation_that_crashes_ends_every_process(two, tmp_path):
    shutil.copy(two / "corpus.jsonl", tmp_path)
    patch = """import microbert.data.prepare as prepare
def crash(*arguments):
    raise RuntimeError("out of luck")
prepare.prepare_tokens = crash"""
    process = start(
        flags_of(tmp_path, 2), script=faulty_script(tmp_path / "crash.py", patch), module="torch.distributed.run"
    )
    wait_until(lambda: len(ranks(process)) == 2, process)
    workers = list(ranks(process).values())
    code, out, err = finish(process)
    assert code == 1 and err.count("error: process 0 of 2: RuntimeError: out of luck") == 1
    assert all_gone(workers, 1)
    found = status(tmp_path / "run")
    assert (found["exit_code"], found["rank"], found["reason"]) == (1, 0, "RuntimeError: out of luck")


@pytest.mark.fault(row=18)
@pytest.mark.slow
def test_a_process_killed_while_another_prepares_ends_both(two, tmp_path):
    shutil.copy(two / "corpus.jsonl", tmp_path)
    patch = f"""import microbert.runtime.stopping as stopping, microbert.data.prepare as prepare
stopping.STOP_SECONDS = 3.0
def long(corpus, tokenizer, config, check_stop):
    open({str(tmp_path / "preparing")!r}, "w")
    while True:
        check_stop()
        time.sleep(0.1)
prepare.prepare_tokens = long"""
    process = start(
        flags_of(tmp_path, 2),
        script=faulty_script(tmp_path / "long.py", patch),
        module="torch.distributed.run",
        patience=FOREVER,
    )
    wait_until((tmp_path / "preparing").exists, process)
    workers = ranks(process)
    workers[1].kill()
    code, out, err = finish(process)
    assert code == 1
    assert all_gone(list(workers.values()), 1)
    found = status(tmp_path / "run")
    assert (found["exit_code"], found["rank"]) == (1, 0) and "another process was killed" in found["reason"]


@pytest.mark.fault(row=19)
@pytest.mark.slow
def test_two_launches_at_once_finish_with_the_usual_ports_taken(two, tmp_path):
    taken = []
    for port in (12355, 29500, 29400):
        one_port = socket.socket()
        try:
            one_port.bind(("", port))
            one_port.listen()
        except OSError:
            pass  # already in use by another program
        taken.append(one_port)
    try:
        folders = [tmp_path / name for name in ("a", "b")]
        for folder in folders:
            folder.mkdir()
            copy_prepared(two, folder)
        processes = [start(flags_of(folder, 2)) for folder in folders]
        for process, folder in zip(processes, folders, strict=True):
            code, out, err = finish(process)
            assert code == 0, err
            assert result(folder / "run") == result(two / "run")
    finally:
        for one_port in taken:
            one_port.close()


@pytest.mark.fault(row=20)
@pytest.mark.fault(row=21)
@pytest.mark.slow
def test_a_second_launch_in_the_folder_is_refused_and_no_process_outlives_torchrun(two, tmp_path):
    copy_prepared(two, tmp_path)
    flags = flags_of(tmp_path, 2, epochs=2000)
    first = start(flags)
    workers = wait_for_training(first, tmp_path / "run")
    code, out, err = launch(flags)
    assert code == 2 and err.startswith("error: output_dir") and f"process {workers[0].pid}" in err
    assert status(tmp_path / "run")["state"] == "running"

    first.kill()
    first.communicate()
    assert all_gone(list(workers.values()), 10)
    assert status(tmp_path / "run")["exit_code"] == 75
    third = start(flags)
    try:
        wait_until(lambda: status(tmp_path / "run").get("state") == "running", third)
    finally:
        end_tree(third)
        third.communicate()


@pytest.mark.fault(row=24)
@pytest.mark.slow
def test_nan_in_one_process_stops_all_before_the_step_is_applied(two, tmp_path):
    copy_prepared(two, tmp_path)
    patch = """import microbert.train.step as step
real, calls = step.masked_loss, []
def broken(*arguments):
    calls.append(1)
    return real(*arguments) * (float("nan") if rank == 1 and len(calls) == 26 else 1.0)
step.masked_loss = broken"""
    script = faulty_script(tmp_path / "broken.py", patch)
    code, out, err = launch(
        flags_of(tmp_path, 2, save_every=1, keep_checkpoints=100), script=script, module="torch.distributed.run"
    )
    assert code == 1
    found = status(tmp_path / "run")
    assert (found["exit_code"], found["rank"]) == (1, 1)
    assert "step 25" in found["reason"] and "process 1 of 2" in found["reason"] and err.count("was not applied") == 1
    newest = max((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert newest.name == "checkpoint-25"
    assert all(weight.isfinite().all() for weight in load_file(newest / "model.safetensors").values())


@pytest.mark.fault(row=29)
@pytest.mark.slow
def test_a_machine_with_different_tokens_is_detected(two, tmp_path):
    copy_prepared(two, tmp_path)
    (tmp_path / "other.jsonl").write_text((two / "corpus.jsonl").read_text() + '{"text": "one more film"}\n')
    patch = f"""if rank == 1:
    sys.argv[sys.argv.index("--dataset") + 1] = {str(tmp_path / "other.jsonl")!r}
    sys.argv += ["--cache-dir", {str(tmp_path / "other_cache")!r}]
    os.environ["LOCAL_RANK"] = "0\""""
    script = faulty_script(tmp_path / "other.py", patch)
    code, out, err = launch(flags_of(tmp_path, 2), script=script, module="torch.distributed.run")
    assert code == 1
    found = status(tmp_path / "run")
    assert (found["exit_code"], found["rank"]) == (2, 1)
    assert "tokens are not those of the first process" in found["reason"]
    assert not list((tmp_path / "run").glob("checkpoint-*"))

"""A fine-tuned run classifies texts, is tested on documents that no training has seen, and loads in transformers."""

import dataclasses
import json
import random
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from helpers import WORDS, run_module
from models import noisy_model
from safetensors.torch import load_file

from microbert.data.labelled import LabelledTexts, read_labelled
from microbert.data.tokenizer import PAD_ID
from microbert.errors import InputError
from microbert.fill_mask import load_run
from microbert.finetune import (
    WHOLE_TEXT,
    _read_flags,
    check_output,
    encode_labelled,
    finetune,
    held_out,
    tokens_read_of_a_text,
    worth_of_pretraining,
)
from microbert.model.classifier import TextClassifier, encode_texts, save_classifier
from microbert.model.export import save_model
from microbert.model.layers import ModelConfig
from microbert.train.choosing import choose
from microbert.train.finetuning import Settings, matmul_dtype, new_classifier, train_classifier


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """Texts in which one word in the middle decides the label."""
    rng, path = random.Random(3), tmp_path_factory.mktemp("labels") / "labels.jsonl"
    lines = []
    for number in range(400):
        words, label = rng.choices([word for word in WORDS if word not in ("great", "bad")], k=6), number % 2
        words[rng.randrange(6)] = ("bad", "great")[label]
        lines.append(json.dumps({"text": f"{number} " + " ".join(words), "label": ("worse", "better")[label]}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(params=["bert", "modern"])
def folder(request, finished_run, tmp_path):
    """A run's folder with three layers of either architecture."""
    _, tokenizer = load_run(finished_run / "run")
    shutil.copy(finished_run / "run" / "held_out.json", tmp_path)
    model = noisy_model(
        vocab_size=tokenizer.get_vocab_size(), n_layers=3, n_heads=2, n_embed=16, max_seq_len=32, arch=request.param
    )
    save_model(model, tokenizer, tmp_path)
    return tmp_path


def test_it_learns_which_word_decides_and_transformers_loads_the_folder(folder, labels, tmp_path, capsys):
    output = tmp_path / "classifier"
    found = finetune(
        folder, Settings(dataset=str(labels), epochs=30, learning_rate=5e-5, device="cpu", output_dir=str(output))
    )
    printed = capsys.readouterr().out
    share = found[f"{folder}, fine-tuned"]
    assert share > 0.9 > 0.7 > found["the most frequent label"] and f"{share:.1%}" in printed
    texts = read_labelled(str(labels), None, None, None, 42)
    test = texts.take(held_out(texts, folder))
    classify = transformers.pipeline("text-classification", model=str(output), device="cpu")
    assert (
        np.mean(
            [
                found["label"] == test.names[label]
                for found, label in zip(classify(test.texts), test.labels, strict=True)
            ]
        )
        == share
    )
    with pytest.raises(InputError, match="exists: --overwrite"):
        finetune(folder, Settings(dataset=str(labels), output_dir=str(output)))


@pytest.mark.slow
def test_in_bf16_it_learns_as_well_and_is_tested_in_fp32(folder, labels, tmp_path, monkeypatch):
    assert matmul_dtype(16, torch.device("cuda")) == torch.float32
    monkeypatch.setattr("microbert.train.finetuning.matmul_dtype", lambda n_embed, device: torch.bfloat16)
    seen, forward = set(), TextClassifier.forward

    def watched(self, *arguments):
        logits = forward(self, *arguments)
        seen.add((self.training, logits.dtype))
        return logits

    monkeypatch.setattr(TextClassifier, "forward", watched)
    found = finetune(
        folder,
        Settings(
            dataset=str(labels),
            epochs=30,
            learning_rate=5e-5,
            device="cpu",
            baselines=False,
            output_dir=str(tmp_path / "out"),
        ),
    )
    assert found[f"{folder}, fine-tuned"] > 0.9
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    assert {weight.dtype for weight in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


def test_it_is_tested_on_the_documents_that_the_run_held_out(finished_run):
    """Exactly those that make up the run's held-out tokens."""
    rows = [json.loads(line)["text"] for line in (finished_run / "corpus.jsonl").read_text().splitlines()]
    is_held_out = held_out(LabelledTexts(rows, np.zeros(len(rows), np.int64), ["x"]), finished_run / "run")
    [tokens] = finished_run.glob("cache/*/tokens-*")
    [tokenizer] = finished_run.glob("cache/*/tokenizer-*.json")
    _, tokenizer = load_run(finished_run / "run")
    on_disk = np.fromfile(tokens / "held_out.bin", np.uint16).reshape(-1, 32)
    assert (
        is_held_out.sum() == json.loads((tokens / "manifest.json").read_text())["report"]["held_out"] == len(on_disk)
    )  # not packed: a sequence each
    expected = {tuple(tokenizer.encode(rows[number]).ids[:5]) for number in np.flatnonzero(is_held_out)}
    assert {tuple(row[:5]) for row in on_disk.tolist()} == expected


def changed_by_training(folder, labels, trainable):
    """The names of the weights that training changes."""
    texts, (encoder, tokenizer) = read_labelled(str(labels), None, None, 64, 42), load_run(folder)
    settings = Settings(trainable=trainable, epochs=1, learning_rate=5e-5)
    model = new_classifier(encoder, 2, settings, is_pretrained=True)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    train_classifier(model, encode_labelled(tokenizer, texts, 32), settings, "training")
    return {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}


AFTER_THE_LAYERS = {
    "bert": {"classifier.weight", "classifier.bias", "pooler.weight", "pooler.bias"},
    "modern": {"classifier.weight", "classifier.bias", "encoder.head.transform", "encoder.head.norm"},
}


def test_only_the_chosen_layers_are_trained(folder, labels):
    parts = {
        trainable: {
            ".".join(name.split(".")[: 2 if "embeddings" in name else 3])
            for name in changed_by_training(folder, labels, trainable)
        }
        for trainable in ("classifier", "last_2", "all")
    }
    arch = load_run(folder)[0].config.arch
    assert parts["classifier"] == AFTER_THE_LAYERS[arch]
    assert parts["last_2"] == parts["classifier"] | {"encoder.layers.1", "encoder.layers.2"}
    assert parts["all"] == parts["last_2"] | {"encoder.layers.0", "encoder.embeddings"} | (
        {"encoder.head.input_norm"} if arch == "modern" else set()
    )


@pytest.mark.parametrize("trainable, n_shrunk", [("classifier", 0), ("last_2", 2), ("all", 3)])
def test_only_pretrained_matrices_of_trained_layers_are_scaled_down(trainable, n_shrunk, folder):
    settings, pretrained = Settings(trainable=trainable, shrink=0.25), load_run(folder)[0].state_dict()
    for is_pretrained in (True, False):
        model = new_classifier(load_run(folder)[0], 2, settings, is_pretrained)
        shrunk = {
            name for name, weight in model.encoder.state_dict().items() if not torch.equal(weight, pretrained[name])
        }
        expected = {
            name
            for name, weight in pretrained.items()
            if name.startswith("layers.") and int(name.split(".")[1]) >= 3 - n_shrunk and weight.ndim == 2
        }
        assert shrunk == (expected if is_pretrained else set()) and (n_shrunk == 0) == (not expected)
        assert all(torch.equal(model.encoder.state_dict()[name], 0.25 * pretrained[name]) for name in shrunk)


@pytest.mark.slow
def test_texts_are_read_whole_if_positions_are_rotary(folder, labels, tmp_path):
    """The word that decides comes after the run's 32 tokens."""
    path, output = tmp_path / "long.jsonl", tmp_path / "classifier"
    rows = [json.loads(line) for line in labels.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(row | {"text": " ".join(["the"] * 40) + " " + row["text"]}) for row in rows))
    settings = Settings(
        dataset=str(path), epochs=30, learning_rate=5e-5, device="cpu", baselines=False, output_dir=str(output)
    )
    is_rotary = load_run(folder)[0].config.arch == "modern"
    if not is_rotary:
        with pytest.raises(InputError, match="32 positions"):
            finetune(folder, dataclasses.replace(settings, max_seq_len=80))
    share = finetune(folder, settings)[f"{folder}, fine-tuned"]
    assert (share > 0.9) == is_rotary
    assert (
        json.loads((output / "config.json").read_text())["max_position_embeddings"]
        == transformers.AutoTokenizer.from_pretrained(output).model_max_length
        == (WHOLE_TEXT if is_rotary else 32)
    )


@pytest.mark.parametrize("arch, own, expected", [("bert", 128, 128), ("modern", 128, 512), ("bert", 1024, 512)])
def test_of_a_text_are_read_as_many_tokens_as_there_are_positions(arch, own, expected):
    assert tokens_read_of_a_text(ModelConfig(60, 1, 2, 8, own, arch=arch)) == expected


def test_settings_are_chosen_without_the_documents_that_judge(folder, labels, tmp_path, monkeypatch, capsys):
    """Also for random weights: what is chosen, and trained on, are documents that the run has not held out."""
    seen = []
    monkeypatch.setattr("microbert.train.choosing.RATES", (5e-5, 1e-4))
    monkeypatch.setattr("microbert.train.choosing.LEAST_EPOCHS", 1)
    monkeypatch.setattr("microbert.train.choosing.LEAST_STEPS", 1)

    def watched(start, texts, *arguments):
        seen.append({bytes(np.trim_zeros(row)) for row in texts.rows})
        return choose(start, texts, *arguments)

    monkeypatch.setattr("microbert.finetune.choose", watched)
    finetune(folder, Settings(dataset=str(labels), device="cpu", output_dir=str(tmp_path / "out")))
    texts = read_labelled(str(labels), None, None, None, 42)
    tokenizer, is_held_out = load_run(folder)[1], held_out(texts, folder)
    rows = encode_texts(tokenizer, texts.texts, 32)
    judging = {bytes(np.trim_zeros(row)) for row in rows[is_held_out]}
    assert len(seen) == 2 and seen[0] == seen[1] == {bytes(np.trim_zeros(row)) for row in rows[~is_held_out]}
    assert judging and not seen[0] & judging
    printed = capsys.readouterr().out
    for description in ("fine-tuning", "from random weights"):
        assert f"{description}: learning rate " in printed
    assert printed.count(f"1 epoch chosen on {(~is_held_out).sum()} training texts in 5 folds (") == 2
    assert " to choose the learning rate and the number of epochs, and as many from random weights" in printed
    for given, chosen in ((dict(epochs=1), "the learning rate"), (dict(learning_rate=5e-5), "the number of epochs")):
        open_settings = Settings(dataset=str(labels), device="cpu", baselines=False, **given)
        finetune(folder, dataclasses.replace(open_settings, output_dir=str(tmp_path / chosen)))
        assert f" to choose {chosen}\n" in capsys.readouterr().out


@pytest.mark.parametrize("adversarial, passes", [(0.0, 1), (0.01, 2)])
def test_the_tokens_of_both_passes_are_announced_and_counted(adversarial, passes, folder, labels, tmp_path, capsys):
    settings = Settings(dataset=str(labels), epochs=2, learning_rate=5e-5, device="cpu", adversarial=adversarial)
    finetune(folder, dataclasses.replace(settings, baselines=False, output_dir=str(tmp_path / "out")))
    printed = capsys.readouterr().out
    texts = read_labelled(str(labels), None, None, None, 42)
    rows = encode_texts(load_run(folder)[1], texts.take(~held_out(texts, folder)).texts, 32)
    n_tokens = passes * 2 * int((rows != PAD_ID).sum())
    assert f"reads at most {n_tokens:,} tokens\n" in printed and f"2 epochs, {n_tokens:,} tokens read\n" in printed


def test_what_pretraining_is_worth_is_said_with_its_standard_error():
    right, fewer = np.arange(400) % 10 < 8, np.arange(400) % 10 < 7
    assert worth_of_pretraining(right, fewer) == (
        "pretraining helps: +10.0 points \u00b1 1.5 compared with random weights"
    )
    told = worth_of_pretraining(fewer, right)
    assert told.startswith("pretraining hurts: -10.0 points \u00b1 1.5 compared with random weights. Try a longer")
    for other in (right, np.roll(right, 3)):
        told = worth_of_pretraining(right, other)
        assert told.startswith("unclear: ") and "Try a longer pretraining" in told


@pytest.mark.parametrize(
    "n_better, beginning", [(3, "unclear: +3.0 points \u00b1 1.7"), (4, "pretraining helps: +4.0")]
)
def test_a_difference_counts_from_two_standard_errors_on(n_better, beginning):
    """Of 100 texts, that many are right only after pretraining: 1.76 and 2.04 standard errors."""
    right = np.arange(100) < n_better
    assert worth_of_pretraining(right, np.zeros(100, bool)).startswith(beginning)
    opposite = beginning.replace("+", "-").replace("helps", "hurts")
    assert worth_of_pretraining(np.zeros(100, bool), right).startswith(opposite)


def test_a_few_texts_tell_nothing():
    for n_texts in (1, 29):
        told = worth_of_pretraining(np.ones(n_texts, bool), np.zeros(n_texts, bool))
        assert told.startswith("unclear: too few texts to tell") and f"({n_texts} held out" in told
    enough = np.ones(30, bool)
    assert worth_of_pretraining(enough, ~enough).startswith("pretraining helps: +100.0")


def test_each_accuracy_is_printed_before_the_next_training(folder, labels, tmp_path, monkeypatch, capsys):
    """That of random weights comes last, because it takes as long as the model itself."""
    printed = []

    def watched(*arguments):
        printed.append(capsys.readouterr().out)
        return train_classifier(*arguments)

    monkeypatch.setattr("microbert.finetune.train_classifier", watched)
    found = finetune(
        folder,
        Settings(dataset=str(labels), epochs=1, learning_rate=5e-5, device="cpu", output_dir=str(tmp_path / "out")),
    )
    before, between, after = *printed, capsys.readouterr().out
    share = f"{found[f'{folder}, fine-tuned']:.1%}"
    assert "accuracy on" not in before and f"fine-tuned {share}" in " ".join(between.split())
    assert "the most frequent label" in between and "random weights" not in between
    assert "  the same from random weights" in after and "compared with random weights" in after


def test_it_starts_from_the_runs_encoder(folder, labels, tmp_path):
    finetune(
        folder,
        Settings(
            dataset=str(labels),
            max_samples=100,
            epochs=1,
            learning_rate=5e-5,
            trainable="classifier",
            device="cpu",
            baselines=False,
            output_dir=str(tmp_path / "out"),
        ),
    )
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    of_encoder = [name for name in after if name.startswith(("bert.", "model.")) and "pooler" not in name]
    assert len(of_encoder) > 10 and all(torch.equal(before[name], after[name]) for name in of_encoder)


def test_the_same_seed_gives_the_same_weights(folder, labels):
    def run(seed, name):
        return finetune(
            folder,
            Settings(
                dataset=str(labels),
                epochs=1,
                learning_rate=5e-5,
                seed=seed,
                device="cpu",
                baselines=False,
                output_dir=str(folder / name),
            ),
        )

    run(1, "a"), run(1, "b"), run(2, "c")
    weights = [(folder / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_the_command_prints_a_table(finished_run, labels, tmp_path):
    done = run_module(
        "finetune",
        str(finished_run / "run"),
        "--dataset",
        str(labels),
        "--epochs",
        "1",
        "--lr",
        "5e-5",
        "--output-dir",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    table = lines[next(number for number, line in enumerate(lines) if line.startswith("accuracy on")) :]
    rows = [line for line in table if line.startswith("  ") and "%" in line]
    assert "fine-tuned" in rows[0] and "most frequent" in rows[-2] and "random weights" in rows[-1]
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--trainable", "some"], "trainable"),
        (["--epochs", "0"], "epochs"),
        (["--lr", "nan"], "learning_rate"),
        (["--shrink", "0"], "shrink"),
        (["--adversarial", "1"], "adversarial"),
        (["--max-seq-len", "2"], "max_seq_len"),
        (["--epochs", "1.5"], "epochs"),
        (["--dataset", "no/such.csv"], "no such file"),
        (["--device", "gpu"], "device"),
        (["--max-samples", "4"], "too few"),
    ],
)
@pytest.mark.slow
def test_a_mistake_is_one_line_and_leaves_nothing(flags, words, finished_run, tmp_path):
    done = run_module(
        "finetune", str(finished_run / "run"), "--device", "cpu", "--output-dir", str(tmp_path / "out"), *flags
    )
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_folder_without_a_model_is_an_error(tmp_path):
    done = run_module("finetune", str(tmp_path), "--max-samples", "100", "--output-dir", str(tmp_path / "out"))
    assert done.returncode == 2 and "holds no model yet" in done.stderr


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_one_line_and_leaves_nothing(finished_run, labels, tmp_path):
    done = run_module(
        "finetune",
        str(finished_run / "run"),
        "--dataset",
        str(labels),
        "--device",
        "cpu",
        "--output-dir",
        str(tmp_path / "out"),
        "--epochs",
        "1",
        "--lr",
        "1e30",
    )
    assert done.returncode == 1 and "lower learning_rate" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_text(""),
        lambda path: path.symlink_to("nowhere"),
        lambda path: (path / "notes").mkdir(parents=True),
        lambda path: shutil.copytree(path.parent / "run", path),
        lambda path: path.symlink_to(path.parent / "classifier"),
    ],
    ids=["file", "broken link", "other files", "run", "link to a classifier"],
)
def test_only_a_classifier_is_replaced(make, folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(folder, place / "run")
    encoder, tokenizer = load_run(folder)
    (place / "classifier").mkdir()
    save_classifier(TextClassifier(encoder, 2, seed=0), tokenizer, ["a", "b"], place / "classifier")
    make(place / "output")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="not a classifier, so it is not replaced"):
            check_output(place / "output", overwrite)
    check_output(place / "classifier", overwrite=True)
    check_output(place / "new" / "output", overwrite=False)
    (place / "empty").mkdir()
    check_output(place / "empty", overwrite=False)
    with pytest.raises(InputError, match="--overwrite"):
        check_output(place / "classifier", overwrite=False)
    (place / "file").write_text("")
    with pytest.raises(InputError, match="cannot be created"):
        check_output(place / "file" / "output", overwrite=False)


@pytest.mark.parametrize(
    "flags, baselines, overwrite",
    [
        ("run", True, False),
        ("run --no-baselines", False, False),
        ("run --baselines false", False, False),
        ("--baselines=no --overwrite run", False, True),
        ("--overwrite TRUE --baselines run", True, True),
    ],
)
def test_booleans_work_as_in_the_scripts_also_before_the_folder(flags, baselines, overwrite, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["finetune", *flags.split()])
    folder, settings = _read_flags()
    assert (str(folder), settings.baselines, settings.overwrite) == ("run", baselines, overwrite)


def test_help_has_a_text_for_every_constant(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune", "--help"])
    with pytest.raises(SystemExit):
        _read_flags()
    words = " ".join(capsys.readouterr().out.split())
    assert words.count("[default: ") == 17 and "documents per step [default: 32]" in words

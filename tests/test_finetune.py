"""A run's encoder learns to tell texts apart, is judged on what no training has seen, and leaves a folder that transformers loads."""

import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from helpers import ROOT, TIME_LIMIT, WORDS
from models import noisy_model

from microbert.config import InputError
from microbert.export import save_model
from microbert.fill_mask import load_run
from microbert.finetune import Classifier, Settings, choose_trainable, finetune, held_out, load_classifier
from microbert.labelled import LabelledTexts, read_labelled

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """Texts of which one word in the middle tells the label."""
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
    model = noisy_model(vocab_size=tokenizer.get_vocab_size(), n_layers=3, n_heads=2, n_embed=16, max_seq_len=32, arch=request.param)
    save_model(model, tokenizer, tmp_path)
    return tmp_path


def test_it_learns_what_a_word_tells_and_transformers_loads_the_folder(folder, labels, tmp_path, capsys):
    output = tmp_path / "classifier"
    found = finetune(folder, Settings(dataset=str(labels), epochs=8, device="cpu", output_dir=str(output)))
    told = capsys.readouterr().out
    accuracy = found[f"{folder}, fine-tuned"]
    assert accuracy > 0.9 > 0.7 > found["the most frequent label"] and f"{accuracy:.1%}" in told
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(output, output_loading_info=True)
    assert not any(report.values()) and model.config.id2label == {0: "better", 1: "worse"}
    classifier = Classifier(model, transformers.AutoTokenizer.from_pretrained(output), CPU)
    texts = read_labelled(str(labels), None, None, None, 42)
    assert classifier.accuracy(texts.take(held_out(texts, folder)), 7) == accuracy
    with pytest.raises(InputError, match="there already"):
        finetune(folder, Settings(dataset=str(labels), output_dir=str(output)))


def test_it_judges_by_the_documents_that_the_run_has_held_out(finished_run):
    """Those whose words make up the run's held-out tokens, and no other."""
    rows = [json.loads(line)["text"] for line in (finished_run / "corpus.jsonl").read_text().splitlines()]
    is_held_out = held_out(LabelledTexts(rows, np.zeros(len(rows), np.int64), ["x"]), finished_run / "run")
    [tokens] = finished_run.glob("cache/*/tokens-*")
    [tokenizer] = finished_run.glob("cache/*/tokenizer-*.json")
    _, tokenizer = load_run(finished_run / "run")
    on_disk = np.load(tokens / "held_out-00000.npy")
    assert is_held_out.sum() == json.loads((tokens / "manifest.json").read_text())["report"]["held_out"] == len(on_disk)  # not packed: a sequence each
    expected = {tuple(tokenizer.encode(rows[number]).ids[:5]) for number in np.flatnonzero(is_held_out)}
    assert {tuple(row[:5]) for row in on_disk.tolist()} == expected


def changed_by_training(folder, labels, trainable):
    """The names of the weights that training changes."""
    texts = read_labelled(str(labels), None, None, 64, 42)
    classifier = load_classifier(folder, texts.names, CPU, 0, pretrained=True)
    before = {name: weight.clone() for name, weight in classifier.model.state_dict().items()}
    classifier.train(texts, Settings(trainable=trainable, epochs=1, device="cpu"), "training")
    return {name for name, weight in classifier.model.state_dict().items() if not torch.equal(weight, before[name])}


def test_the_layers_that_are_chosen_learn_and_no_other(folder, labels):
    names = set(load_classifier(folder, ["a", "b"], CPU, 0, pretrained=True).model.state_dict())
    of_layer = {number: {name for name in names if f"layer.{number}." in name or f"layers.{number}." in name} for number in range(3)}
    assert all(of_layer.values())
    of_encoder = {name for name in names if name.startswith(("bert.", "model.")) and "pooler" not in name}
    assert changed_by_training(folder, labels, "classifier") <= names - of_encoder
    last_2 = changed_by_training(folder, labels, "last_2")
    assert not last_2 & of_layer[0] and last_2 & of_layer[1] and last_2 & of_layer[2] and not any("embeddings" in name for name in last_2)
    assert changed_by_training(folder, labels, "all") & of_layer[0]


def test_the_pretrained_encoder_is_taken_and_the_random_one_is_not(folder):
    def weights(pretrained):
        model = load_classifier(folder, ["a", "b"], CPU, 0, pretrained).model
        return model.get_input_embeddings().weight.detach().numpy()

    stored = load_run(folder)[0].embeddings.word.weight.detach().numpy()
    np.testing.assert_array_equal(weights(True), stored)
    assert np.abs(weights(False) - stored).mean() > 0.01


def test_one_seed_gives_one_result(folder, labels):
    def run(seed, name):
        return finetune(folder, Settings(dataset=str(labels), max_samples=100, epochs=1, seed=seed, device="cpu", baselines=False, output_dir=str(folder / name)))

    run(1, "a"), run(1, "b"), run(2, "c")
    weights = [(folder / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "microbert.finetune", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT)


def test_the_command_prints_a_table(finished_run, labels, tmp_path):
    done = command(str(finished_run / "run"), "--dataset", str(labels), "--epochs", "1", "--output-dir", str(tmp_path / "out"), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    table = lines[next(number for number, line in enumerate(lines) if line.startswith("accuracy on")) :]
    assert ["fine-tuned" in table[1], "random weights" in table[2], "most frequent" in table[3] or "tf-idf" in table[3]] == [True] * 3
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("flags, told", [
    (["--trainable", "some"], "trainable"), (["--epochs", "0"], "epochs"), (["--lr", "nan"], "learning_rate"), (["--epochs", "1.5"], "epochs"),
    (["--dataset", "no/such.csv"], "no file that exists"), (["--max-samples", "4"], "too few")])
@pytest.mark.slow
def test_mistakes_are_told_in_a_line_and_leave_nothing(flags, told, finished_run, tmp_path):
    done = command(str(finished_run / "run"), "--device", "cpu", "--output-dir", str(tmp_path / "out"), *flags)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_model_is_told(tmp_path):
    done = command(str(tmp_path), "--max-samples", "100", "--output-dir", str(tmp_path / "out"))
    assert done.returncode == 2 and "holds no model yet" in done.stderr


def test_freezing_leaves_the_classifier_alone(folder):
    model = load_classifier(folder, ["a", "b", "c"], CPU, 0, pretrained=True).model
    choose_trainable(model, "classifier")
    assert {name.split(".")[0] for name, weight in model.named_parameters() if weight.requires_grad} >= {"classifier"}
    assert model.config.num_labels == 3

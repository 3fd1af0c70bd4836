"""transformers 5 and 4 compute our logits and token ids from an exported folder."""

import itertools
import json
import subprocess
import sys
import unicodedata
import venv

import pytest
import torch
import transformers
from models import noise_, noisy_model, token_rows

from microbert.data.tokenizer import MASK_ID, PAD_ID, save_tokenizer, train_tokenizer
from microbert.model.classifier import TextClassifier, save_classifier
from microbert.model.export import save_model
from microbert.model.hugging_face import hugging_face_config

TEXTS = [
    "Überraschend GUTE Filme, 世界 and café's naïve Ärger!",
    "a film for the whole world .",
    "word wörd WORD Wörd ÉCOLE école Ecole ecole",
]
EDGES = [
    "",
    "ÉCOLE école ECOLE",
    "über-naïve: [MASK] wasn't\u00a0it?",
    "世界and世 界",
    "\u0130stanbul \u00df \u1e9e 1\u00bd",
    "a\x00b\u200bc \ufb01lm",
    "[CLS] the [SEP]",
]
NORMALIZERS = list(itertools.product([False, True], repeat=2))  # lowercase, strip_accents
N_LAYERS, N_TOKENS = 3, 200  # more tokens than ModernBERT's window, and more layers than one of three that sees past it
OLD = "4.57.1"
READ = """
import json, sys
import torch, transformers
transformers.utils.logging.set_verbosity_error()
asked, answers = json.load(open(sys.argv[1])), {"version": transformers.__version__}
with torch.no_grad():
    for folder, classes in asked["models"].items():
        model, report = getattr(transformers, classes).from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        inputs = {"input_ids": torch.tensor(asked["ids"]), "attention_mask": torch.tensor(asked["mask"])}
        answers[folder] = model.eval()(**inputs).logits.tolist()
for folder, texts in asked["tokenizers"].items():
    for name in asked["classes"]:
        answers[f"{folder} {name}"] = getattr(transformers, name).from_pretrained(folder)(texts)["input_ids"]
print(json.dumps(answers))
"""


def tokenizer_with(lowercase, strip_accents):
    return train_tokenizer(lambda: iter(TEXTS * 3), vocab_size=200, lowercase=lowercase, strip_accents=strip_accents)


@pytest.mark.parametrize("lowercase, strip_accents", NORMALIZERS)
def test_all_tokenizer_classes_give_our_token_ids(lowercase, strip_accents, tmp_path):
    tokenizer = tokenizer_with(lowercase, strip_accents)
    texts = [*TEXTS, *EDGES, *(unicodedata.normalize("NFD", text) for text in TEXTS)]
    save_tokenizer(tokenizer, tmp_path, 64)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    ours = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    for name in ("AutoTokenizer", "BertTokenizer", "BertTokenizerFast"):
        loaded = getattr(transformers, name).from_pretrained(tmp_path)
        assert loaded(texts)["input_ids"] == ours, name
        assert (loaded.mask_token_id, loaded.model_max_length) == (MASK_ID, 64)


@torch.no_grad()
def test_older_and_newer_fields_describe_the_same_model():
    """transformers 5 reads the fields of version 4 if its own are missing."""
    model = noisy_model(n_layers=N_LAYERS, n_embed=16, max_seq_len=N_TOKENS, arch="modern")
    stored = hugging_face_config(model.config)
    older = {name: value for name, value in stored.items() if name not in ("rope_parameters", "layer_types")}
    configs = [transformers.AutoConfig.for_model(**fields) for fields in (stored, older)]
    models = [transformers.AutoModel.from_config(config).eval() for config in configs]
    models[1].load_state_dict(models[0].state_dict())
    ids = torch.arange(N_TOKENS)[None] % model.config.vocab_size
    new, old = (model(input_ids=ids).last_hidden_state for model in models)
    assert torch.equal(new, old)


@pytest.fixture(scope="module")
def old_python(tmp_path_factory):
    """Return the Python of a virtual environment with transformers 4 and its pins; the rest comes from this one."""
    folder = tmp_path_factory.mktemp("old")
    venv.create(folder, with_pip=True)
    [packages] = folder.glob("[Ll]ib/**/site-packages")
    (packages / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")) + "\n")
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    command = [python, "-m", "pip", "install", "--quiet", "--no-input", "--retries", "1", "--timeout", "20"]
    done = subprocess.run([*command, f"transformers=={OLD}"], capture_output=True, text=True, timeout=300)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        pytest.skip(f"pip cannot install transformers {OLD}: {reason}")
    return python


@pytest.mark.slow
@torch.no_grad()
def test_transformers_4_gives_our_logits_and_token_ids(old_python, tmp_path):
    ids = torch.from_numpy(token_rows(3, N_TOKENS, shortest=N_TOKENS // 2))
    real, positions = ids != PAD_ID, torch.arange(N_TOKENS).expand(ids.shape)
    texts = [unicodedata.normalize("NFC", text) for text in (*TEXTS, *EDGES)]  # as its Python tokenizer does itself
    expected, models, tokenizers = {}, {}, {}
    for arch in ("bert", "modern"):
        tokenizer = tokenizer_with(True, False)
        vocab_size = tokenizer.get_vocab_size()
        model = noisy_model(N_LAYERS, n_embed=16, max_seq_len=N_TOKENS, vocab_size=vocab_size, arch=arch)
        classifier = noise_(TextClassifier(model, 3, seed=0))
        save_model(model, tokenizer, make(tmp_path / arch))
        save_classifier(classifier, tokenizer, ["bad", "fair", "good"], make(tmp_path / f"{arch}-classifier"))
        expected[str(tmp_path / arch)] = model.logits(ids, real, positions).view(*ids.shape, -1)[real]
        expected[str(tmp_path / f"{arch}-classifier")] = classifier(ids)
        models[str(tmp_path / arch)] = "AutoModelForMaskedLM"
        models[str(tmp_path / f"{arch}-classifier")] = "AutoModelForSequenceClassification"
    for lowercase, strip_accents in NORMALIZERS:
        tokenizer = tokenizer_with(lowercase, strip_accents)
        folder = make(tmp_path / f"tokenizer-{lowercase}-{strip_accents}")
        save_model(noisy_model(vocab_size=tokenizer.get_vocab_size()), tokenizer, folder)
        tokenizers[str(folder)] = texts
        expected[str(folder)] = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    classes = ["AutoTokenizer", "BertTokenizer", "BertTokenizerFast"]
    asked = {
        "ids": ids.tolist(),
        "mask": real.long().tolist(),
        "models": models,
        "tokenizers": tokenizers,
        "classes": classes,
    }
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    command = [old_python, "-c", READ, tmp_path / "asked.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert answers["version"] == OLD
    for folder in models:
        answer = torch.tensor(answers[folder])
        difference = ((answer[real] if answer.ndim == 3 else answer) - expected[folder]).abs().max()
        assert expected[folder].std() > 0.1 and difference < 1e-4, (folder, difference)
    for folder in tokenizers:
        for name in classes:
            assert answers[f"{folder} {name}"] == expected[folder], (folder, name)


def make(folder):
    folder.mkdir()
    return folder

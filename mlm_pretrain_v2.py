"""MicroBERT v2, the standard: pretrain a small BERT on any dataset, bundled, from the Hugging Face Hub or your own.

    python mlm_pretrain_v2.py                                        IMDB, bundled: no network needed
    python mlm_pretrain_v2.py --dataset "texts/*.jsonl.gz" --output-dir runs/mine
    python mlm_pretrain_v2.py --dataset hf                           WikiText-103 from the Hub
    python mlm_pretrain_v2.py --dataset allenai/c4:en --streaming --max-samples 1M
    python mlm_pretrain_v2.py --prepare-only                         stop when the tokens are prepared
    python mlm_pretrain_v2.py --dry-run                              print the plan, do not run
    python mlm_pretrain_v2.py --help                                 every constant below is a flag too

It adds to v1: twice the layers and heads, packing (running text fills every sequence), and half a million documents by
default. The corpus is tokenised once, on all cores and in constant memory; later and resumed runs reuse the tokens.
"""

from microbert.config import read_config

# Model
n_layers = 4  # transformer layers
n_heads = 4  # attention heads per layer; must divide n_embed
n_embed = 8  # width of the hidden states
max_seq_len = 128  # tokens per sequence, including [CLS] and [SEP]
vocab_size = 10000  # tokens in the vocabulary, at most
dropout = 0.0  # on embeddings and sub-layer outputs; runs of a few epochs need none

# Data
dataset = "imdb"  # "imdb" (bundled), "hf", a Hub id "org/name:config", or paths of .txt, .jsonl, .csv or .parquet files
text_column = None  # column to train on; None: "text", or the only column with text
max_samples = "500K"  # documents to read, at most; None reads all
streaming = False  # True reads a Hub dataset without downloading all of it first
packing = True  # True fills every sequence with running text; False: one sequence per document, its first tokens
lowercase = True  # lower-case all text
strip_accents = False  # True turns é into e
mlm_probability = 0.15  # share of tokens masked in training

# Training
epochs = 5  # passes over the training documents
batch_size = 32  # sequences per step, of each process
global_batch_size = None  # sequences per step, of all processes together; None: batch_size of each
micro_batch_size = None  # sequences computed at a time, to save memory; None: the whole batch
learning_rate = 3e-5  # the rate that fine-tunes a 768-wide BERT; scaled to pretraining, width and batch
lr_scaling = "auto"  # "none" uses learning_rate unscaled
optimizer = "muon"  # "adamw", or "muon": Muon for the hidden matrices, AdamW for the rest
schedule = "wsd"  # after the warm-up: "linear" decay, or "wsd" (warm-up, stable, decay)
warmup_ratio = 0.06  # share of the run in which the learning rate rises
decay_ratio = 0.3  # share of the run in which it decays at the end, with "wsd"
weight_decay = 0.01  # of weight matrices
grad_clip = 1.0  # maximum norm of the gradient; None: no clipping

# Run
seed = 42  # of weights, order, masks and held-out documents
device = "auto"  # "cpu", "cuda", "cuda:1", "mps"; "auto" chooses the best available
cuda_graphs = True  # on CUDA, capture a step once and replay it; False launches each kernel from Python
max_minutes = None  # wall-clock limit, from start to export; the schedule adapts to it; None: all epochs
group_timeout = 600  # seconds that a process waits for the others before it gives up
eval_every = None  # steps between evaluations; None: ten per run
save_every = None  # steps between checkpoints; None: ten per run
keep_checkpoints = 2  # newest checkpoints to keep
report_to = None  # "tensorboard" (pip install tensorboard) also writes its files; nothing leaves this machine
output_dir = "runs/v2"  # folder of the run
cache_dir = "cache"  # folder of prepared tokens, used again by later runs
overwrite = False  # True removes an earlier run in output_dir and starts again
prepare_only = False  # True stops when the tokens are prepared
dry_run = False  # True prints the plan; writes neither to output_dir nor to cache_dir


def main() -> None:
    config = read_config(__file__, globals())

    # imported here, because they take seconds to load and --help should not
    from microbert.data.prepare import prepare_corpus
    from microbert.model.build import create_model
    from microbert.runtime.device import choose_device
    from microbert.runtime.run import open_run
    from microbert.train.checkpoint import find_checkpoint, is_finished
    from microbert.train.dry_run import print_plan
    from microbert.train.export_run import export_run
    from microbert.train.loop import train

    if config.dry_run:
        print_plan(config)
        return

    with open_run(config) as run:
        device = choose_device(config.device, run.world)
        if is_finished(run, device):
            print(f"{run.folder} is finished; --overwrite starts again, another --output-dir keeps both")
            return
        checkpoint = find_checkpoint(run, device)

        corpus, tokenizer, tokens = prepare_corpus(run)
        if config.prepare_only:
            print("prepared; the same command without --prepare-only trains on it")
            return

        model = create_model(run, tokens, device)
        state = train(run, checkpoint, model, tokens, tokenizer)
        if run.world.is_first:
            export_run(run, model, tokenizer, corpus, tokens, state)


if __name__ == "__main__":
    main()

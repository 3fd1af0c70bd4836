"""MicroBERT v4, production: pretrain a BERT that is sized to its GPU and never uses more than 24 GB of it.

    python mlm_pretrain_v4.py                                        one GPU, or the CPU
    python mlm_pretrain_v4.py --dry-run                              the plan: memory, disk and time
    python mlm_pretrain_v4.py --dry-run --gpu-memory-gb 141 --num-gpus 8    the plan for a machine not at hand
    torchrun --standalone --nproc_per_node=8 mlm_pretrain_v4.py      eight GPUs of one machine
    ./train_h200_8gpu_v4.sh                                          the same with the large preset on a larger corpus
    scripts/train_24gb.sh                                            the large preset on one GPU of 24 GB
    python mlm_pretrain_v4.py --help                                 every constant below is a flag too

It adds to v3: a useful model (4 to 6 layers, 8 heads, 128 dimensions, 50K tokens), sized by the GPU's memory or by a
preset; a recipe for it (modern architecture, rows of 8 to 512 tokens of one document each, 40 % of tokens
masked, ten million documents by default); a memory plan before any memory is used, and a cap; micro-batches as large as
fit; bf16 on devices that are fast in it, and torch.compile on GPUs (docs/memory.md).
"""

from microbert.config import read_config

# Size: the preset sets the constants below that are None
#   "auto":  8 heads, 128-dim, 128 tokens, vocabulary of 50K; layers and batch size depend on the GPU's memory
#   "large": 8 layers, 8 heads, 256-dim, 256 tokens, vocabulary of 25K, batch size 96
preset = "auto"  # "auto": 128-dim, sized to the GPU; "large": 8 layers, 256-dim
memory_budget_gb = 24  # limit for a GPU, or for each process on a CPU; None: all of its memory

# Model
arch = "modern"  # "modern": rotary positions, pre-norm, gated, exported as ModernBERT; "bert": as v1 to v3
n_layers = None  # transformer layers
n_heads = None  # attention heads per layer; must divide n_embed
n_embed = None  # width of the hidden states
max_seq_len = None  # tokens per sequence, including [CLS] and [SEP]
vocab_size = None  # tokens in the vocabulary, at most
embedding_init = "neighbours"  # words with the same neighbours in the text start with similar embeddings; or "random"
dropout = 0.0  # on embeddings and sub-layer outputs; runs of a few epochs need none

# Data
dataset = "imdb"  # "imdb" (bundled), "hf", a Hub id "org/name:config", or paths of .txt, .jsonl, .csv or .parquet files
text_column = None  # column to train on; None: "text", or the only column with text
max_samples = "10M"  # documents to read, at most; None reads all
streaming = False  # True reads a Hub dataset without downloading all of it first
# With rows = "documents", the rows of a step have one of the lengths 8, 16, 32, ... 512, and batch_size x max_seq_len
# tokens in all: max_seq_len is the unit of a step and of the held-out loss, not the length of the longest row. The
# model reads 512 tokens. With arch = "bert", which has weights for max_seq_len positions, no row is longer than that.
rows = "documents"  # "documents": whole documents and pieces of them, 8 to 512 tokens; "packed": as v1 to v3
packing = True  # True fills every sequence with running text; False: one sequence per document, its first tokens
lowercase = True  # lower-case all text
strip_accents = False  # True turns é into e
mlm_probability = 0.4  # share of tokens masked in training; evaluation masks 0.15

# Training
epochs = 5  # passes over the training documents
batch_size = None  # sequences per step, of each process
global_batch_size = None  # sequences per step, of all processes together; None: batch_size of each
micro_batch_size = None  # sequences computed at a time, to save memory; None: as many as fit
learning_rate = 3e-5  # the rate that fine-tunes a 768-wide BERT; scaled to pretraining, width and batch
lr_scaling = "auto"  # "none" uses learning_rate unscaled
optimizer = "muon"  # "adamw", or "muon": Muon for the hidden matrices, AdamW for the rest
schedule = "wsd"  # after the warm-up: "linear" decay, or "wsd" (warm-up, stable, decay)
warmup_ratio = 0.06  # share of the run in which the learning rate rises
decay_ratio = 0.3  # share of the run in which it decays at the end, with "wsd"
weight_decay = 0.1  # of weight matrices; keeps them small in long runs
grad_clip = 1.0  # maximum norm of the gradient; None: no clipping

# Run
seed = 42  # of weights, order, masks and held-out documents
device = "auto"  # "cpu", "cuda", "cuda:1", "mps"; "auto" chooses the best available
dtype = "auto"  # of matrix products: "float32", "bfloat16"; "auto": bfloat16 on devices that are fast in it
torch_compile = None  # True or False; None compiles the model on CUDA only
cuda_graphs = True  # on CUDA, capture a step once and replay it; False launches each kernel from Python
max_minutes = None  # wall-clock limit, from start to export; the schedule adapts to it; None: all epochs
group_timeout = 600  # seconds that a process waits for the others before it gives up
eval_every = None  # steps between evaluations; None: ten per run
save_every = None  # steps between checkpoints; None: ten per run
keep_checkpoints = 2  # newest checkpoints to keep
report_to = None  # "tensorboard" (pip install tensorboard) also writes its files; nothing leaves this machine
output_dir = "runs/v4"  # folder of the run
cache_dir = "cache"  # folder of prepared tokens, used again by later runs
overwrite = False  # True removes an earlier run in output_dir and starts again
prepare_only = False  # True stops when the tokens are prepared
dry_run = False  # True prints the plan; writes neither to output_dir nor to cache_dir
gpu_memory_gb = None  # with dry_run: plan for GPUs of this size
num_gpus = None  # with dry_run: plan for this many processes


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
    from microbert.train.memory import apply_memory_budget

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

        apply_memory_budget(run, tokens, device)
        model = create_model(run, tokens, device)
        state = train(run, checkpoint, model, tokens, tokenizer)
        if run.world.is_first:
            export_run(run, model, tokenizer, corpus, tokens, state)


if __name__ == "__main__":
    main()

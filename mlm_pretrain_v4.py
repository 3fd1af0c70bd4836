"""MicroBERT v4, production: pretrain a BERT that is sized to the GPU it finds, and never takes more than 24 GB of it.

    python mlm_pretrain_v4.py                                        one GPU, or the CPU
    python mlm_pretrain_v4.py --dry-run                              the plan: what it would take of memory, disk and time
    python mlm_pretrain_v4.py --dry-run --gpu-memory-gb 141 --num-gpus 8    the plan for a machine that is not at hand
    torchrun --standalone --nproc_per_node=8 mlm_pretrain_v4.py      eight GPUs of one machine
    ./train_h200_8gpu_v4.sh                                          the same with the large preset on a larger corpus
    scripts/train_24gb.sh                                            the large preset on one GPU of 24 GB
    python mlm_pretrain_v4.py --help                                 every constant below is a flag too

Over v3 it adds: a model that matters (4 to 6 layers, 8 heads, 128 dimensions, 50K tokens), its size and batch by the GPU's memory or by a preset;
a recipe to match (modern architecture, 40 % of the tokens masked, ten million documents by default); a plan of the memory, printed before it is taken, and a cap
that holds; micro-batches as large as fit; bf16 where the device is fast in it, torch.compile on GPUs. docs/memory.md tells how.
"""

from microbert.config import read_config

# Size: where a constant below is None, the preset decides
preset = "auto"  # "auto": 8 heads, 128-dim, 128 tokens, 50K vocabulary, layers and batch by the GPU; "large": 8 layers, 256-dim, 256 tokens, 25K, batch 96
memory_budget_gb = 24  # of a GPU (on a CPU of each process), at most; None takes what there is

# Model
arch = "modern"  # "modern": rotary positions, pre-norm, gated, exported as ModernBertForMaskedLM; "bert": as v1 to v3
n_layers = None  # transformer layers
n_heads = None  # attention heads a layer; must divide n_embed
n_embed = None  # width of the hidden states
max_seq_len = None  # tokens a sequence, [CLS] and [SEP] included
vocab_size = None  # tokens in the vocabulary, at most
dropout = 0.0  # on embeddings and sub-layer outputs; a run of a few epochs needs none

# Data
dataset = "imdb"  # "imdb" (bundled), "hf", a Hub id "org/name:config", or paths and globs of .txt, .jsonl, .csv, .parquet files
text_column = None  # column to train on; None takes "text", or the only one that holds text
max_samples = "10M"  # documents to read, or all where there are fewer; None takes all
streaming = False  # True reads a Hub dataset as it comes, without downloading all of it
packing = True  # False: one sequence a document, its first tokens; True: running text fills every sequence
lowercase = True  # lower-case all text
strip_accents = False  # True turns é into e
mlm_probability = 0.4  # share of the tokens that are masked in training; held-out losses are always at 0.15

# Training
epochs = 5  # passes over the training documents
batch_size = None  # sequences a step, of each process where torchrun starts several
global_batch_size = None  # sequences a step of all processes together; None takes batch_size of each
micro_batch_size = None  # sequences computed at a time, to save memory; None takes as many as fit
learning_rate = 3e-5  # what fine-tunes a 768-wide BERT; scaled to training this one from scratch
lr_scaling = "auto"  # "none" uses learning_rate as it stands
optimizer = "muon"  # "adamw", or "muon": Muon for the hidden matrices, AdamW for the rest
schedule = "wsd"  # the learning rate after its rise: "linear" falls; "wsd" holds (warm-up, stable, decay)
warmup_ratio = 0.06  # share of the run in which the learning rate rises
decay_ratio = 0.3  # with "wsd": share of the run in which it falls at the end
weight_decay = 0.01  # of the weight matrices
grad_clip = 1.0  # largest norm of the gradient; None leaves it

# Run
seed = 42  # another seed: other weights, order, masks and held-out documents
device = "auto"  # "cpu", "cuda", "cuda:1", "mps"; "auto" takes the best there is
dtype = "auto"  # of matrix products: "float32", "bfloat16"; "auto" takes bfloat16 where the device has units for it
torch_compile = None  # True or False; None compiles the model on CUDA alone
cuda_graphs = True  # on CUDA, a step is recorded once and played back; False starts each kernel from Python
max_minutes = (
    None  # wall-clock time of all of it, from start to export; the learning rate falls in time. None: all epochs
)
group_timeout = 600  # seconds that a process waits for the others before it gives up
eval_every = None  # steps between evaluations; None: ten in a run
save_every = None  # steps between checkpoints; None: ten in a run
keep_checkpoints = 2  # newest checkpoints to keep
report_to = (
    None  # "tensorboard" (pip install tensorboard) writes its files to output_dir too; nothing is ever sent anywhere
)
output_dir = "runs/v4"  # everything that the run leaves
cache_dir = "cache"  # prepared tokens, used again by the next run
overwrite = False  # True removes an earlier run in output_dir and starts anew
prepare_only = False  # True stops when the tokens are prepared
dry_run = False  # True tells what would happen, and writes nothing
gpu_memory_gb = None  # with dry_run: plans for GPUs of this size
num_gpus = None  # with dry_run: plans for so many processes


def main() -> None:
    config = read_config(__file__, globals())

    # only now what takes seconds to load, so that a mistake above is answered at once
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
            print(f"{run.folder} is finished; --overwrite starts anew, another --output-dir keeps both")
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

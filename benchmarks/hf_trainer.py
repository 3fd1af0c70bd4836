"""The reference of two benchmarks: BertForMaskedLM and transformers' Trainer, with this project's shapes and data."""

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from microbert.config.constants import Config
from microbert.data.shards import Tokens
from microbert.model.build import shape_of
from microbert.model.hugging_face import hugging_face_config

WEIGHT_DECAY = 0.01  # of BERT (Devlin et al. 2019)


def new_reference_model(config: Config, tokens: Tokens) -> transformers.BertForMaskedLM:
    """Return BertForMaskedLM with the shape of `config`, whose arch must be "bert"."""
    transformers.set_seed(config.seed)
    shape = shape_of(config, len(tokens.token_counts))
    return transformers.BertForMaskedLM(transformers.BertConfig(**hugging_face_config(shape)))


def new_trainer(
    model: transformers.BertForMaskedLM,
    rows: Sequence[dict[str, torch.Tensor]],
    config: Config,
    folder: Path,
    callback: transformers.TrainerCallback,
    max_steps: int,
    learning_rate: float,
    mlm_probability: float,
    warmup_steps: int = 0,
) -> transformers.Trainer:
    """Return a Trainer on the CPU: fused AdamW, gradient clipping, dynamic masking, no logging and no checkpoints.

    rows: the training set. folder: holds the tokenizer, and receives the Trainer's files.
    """
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=config.batch_size,
        max_steps=max_steps,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=config.grad_clip,
        optim="adamw_torch_fused",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=config.seed,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        callbacks=[callback],
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability),
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return trainer

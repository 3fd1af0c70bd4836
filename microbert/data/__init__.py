"""Text from local files or the Hugging Face Hub to masked batches of token ids."""

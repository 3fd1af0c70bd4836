"""The models, their loss, and their Hugging Face folders."""

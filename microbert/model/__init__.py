"""The models, their loss, and their form in Hugging Face folders."""

"""MicroBERT: pretrain a small BERT from scratch, on your own machine."""

__version__ = "0.1.0"

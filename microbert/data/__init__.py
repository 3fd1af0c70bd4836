"""From files and Hub datasets to masked batches."""

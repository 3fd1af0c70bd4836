"""Done once by the fork server: transformers compiles a thousand regular expressions for its first model."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("bert")

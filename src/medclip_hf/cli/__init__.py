"""The `medclip-hf` command."""

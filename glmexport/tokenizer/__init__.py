"""Text to token ids and back, as the checkpoint's tokenizer files say, and its chat templates."""

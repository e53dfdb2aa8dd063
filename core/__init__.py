"""What every part shares: configuration, tokenizer, artifacts, errors. Only `slm.core.nn` needs PyTorch."""

"""Code that all parts share: configuration, tokenizer, artifacts, errors. Only `slm.core.nn` needs PyTorch."""

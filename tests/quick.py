"""Options with which slow commands are quick, for tests that need their result and not the parts left out."""

QUANTIZE = (
    *("--tokens", "200", "--calibration-tokens", "200", "--max-kl", "1"),
    # Each choice by measurement takes as long as a quantization.
    *("--no-smooth", "--kv-cache", "float32"),
)
FINETUNE = ("--epochs", "1", "--rank", "2", "--samples", "0")

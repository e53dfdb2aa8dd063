"""Defaults that the help of `slm quantize` shows, in a module without other imports."""

# The number of calibration tokens. GPTQ needs more text than a measurement of activations.
CALIBRATION_TOKENS = {"int8": 1024, "int4": 8192}
# The fewest tokens of a fine-tuned model's held-out rows on which quality is measured instead of on the default text.
LEAST_HELD_OUT = 512
# The number of tokens that `--refine` trains on.
REFINE_TOKENS = 65536
# The limit of the KL divergence in nats. Typical values are 0.001 to 0.01 for INT8, 0.02 to 0.15 for INT4
# (docs/quantization.md).
MAX_KL_NATS = {"int8": 0.02, "int4": 0.15}
# The limit of the decrease of a task's score.
MAX_DROP = 0.01

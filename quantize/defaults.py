"""Defaults of `slm quantize` that its help names: here, so that the help imports nothing else."""

# How much text settings are chosen by: GPTQ wants more than it takes to tell how large activations are.
CALIBRATION_TOKENS = {"int8": 1024, "int4": 8192}
# Largest mean divergence in nats. INT8 moves models by 0.001 to 0.01, INT4 by 0.02 to 0.15 (docs/quantization.md).
MAX_KL_NATS = {"int8": 0.02, "int4": 0.15}

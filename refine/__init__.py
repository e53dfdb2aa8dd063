"""Refinement of quantized weights by distillation, with PyTorch (`slm quantize --refine`)."""

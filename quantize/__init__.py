"""Quantization of bundles, and measurement of its effect. Needs onnx but not torch.

`slm.quantize(...)`, the package itself, quantizes a bundle: `slm.steps.quantizing.quantize`.
"""

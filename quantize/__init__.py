"""Quantization of bundles, and measurement of its effect. Needs onnx but not torch."""

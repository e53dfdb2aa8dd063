"""Smaller weights, and the measurement of what they cost. Needs onnx but not torch."""

"""Runs bundles with onnxruntime: session, caches, sampling, generation. Needs neither torch nor onnx."""

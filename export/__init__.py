"""Checkpoint to ONNX: the graph, the bundle around it, and the proof that it computes the same."""

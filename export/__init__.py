"""Export of a checkpoint to ONNX: the graph, the bundle around it, and its verification against PyTorch."""

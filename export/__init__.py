"""Export of a checkpoint to ONNX: the graph, the bundle around it, and its verification against PyTorch.

`slm.export(...)`, the package itself, exports a checkpoint: `slm.steps.exporting.export`.
"""

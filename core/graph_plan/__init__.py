"""The expected graph of a bundle, node by node. The manifest and the configuration determine everything except the weights.

`slm.export.graph` writes these graphs. This package repeats their nodes in modules of the same names, because the onnx package
is not installed on devices, and because a list of permitted operators is not enough: a chain of concatenations can double a
tensor forty times. `tests/export/test_graph_plan.py` compares both packages for every kind of bundle.
"""

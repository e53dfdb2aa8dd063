"""The model as an ONNX graph, built module by module from a description; needs neither torch nor tracing."""

from slm.export.graph.formats import BlockFormat, FloatFormat, WeightFormat
from slm.export.graph.model import build_graph
from slm.export.graph.store import LazyTensors, checkpoint_tensors, graph_tensors, released, save_graph

__all__ = [
    "BlockFormat",
    "FloatFormat",
    "LazyTensors",
    "WeightFormat",
    "build_graph",
    "checkpoint_tensors",
    "graph_tensors",
    "released",
    "save_graph",
]

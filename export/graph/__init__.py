"""The model as an ONNX graph, built module by module from the configuration, without torch or tracing."""

from slm.export.graph.dequantized import DequantizedFormat, portable_tensors
from slm.export.graph.formats import BlockFormat, FloatFormat, GemmFormat, WeightFormat
from slm.export.graph.fused import Fused
from slm.export.graph.model import build_graph
from slm.export.graph.portable import Portable
from slm.export.graph.slots import SlotFormat, check_slots
from slm.export.graph.store import LazyTensors, checkpoint_tensors, float_tensors, graph_tensors, released, save_graph
from slm.export.graph.target import Operators

__all__ = [
    "BlockFormat",
    "DequantizedFormat",
    "FloatFormat",
    "Fused",
    "GemmFormat",
    "LazyTensors",
    "Operators",
    "Portable",
    "SlotFormat",
    "WeightFormat",
    "build_graph",
    "check_slots",
    "checkpoint_tensors",
    "float_tensors",
    "graph_tensors",
    "portable_tensors",
    "released",
    "save_graph",
]

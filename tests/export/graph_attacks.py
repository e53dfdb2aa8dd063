"""Attacks on a graph: changes of a file that slm wrote, each of which the check of graphs must reject."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def at_the_end(model: onnx.ModelProto, *nodes: onnx.NodeProto) -> None:
    """Inserts nodes between the logits and the output. The output of the last one is "bomb"."""
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == "logits":
                node.output[index] = "before"
    model.graph.node.extend([*nodes, helper.make_node("Add", ["before", "bomb"], ["logits"], name="end")])


def constant(model: onnx.ModelProto, name: str, array: Any) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return name


def zeros_of_4_gib(model: onnx.ModelProto) -> None:
    shape = constant(model, "shape", np.array([1 << 30], np.int64))
    made = helper.make_node("ConstantOfShape", [shape], ["zeros"], name="zeros")
    summed = helper.make_node("ReduceSum", ["zeros"], ["bomb"], name="sum", keepdims=0)
    at_the_end(model, made, summed)


def endless_loop(model: onnx.ModelProto) -> None:
    identity = helper.make_node("Identity", ["go"], ["on"])
    inside = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
    ]
    body = helper.make_graph([identity], "body", inside, [helper.make_tensor_value_info("on", TensorProto.BOOL, [])])
    go = constant(model, "go on", np.array(True))
    model.graph.node.insert(0, helper.make_node("Loop", ["", go], [], name="endless", body=body))


def doubling_chain(kind: str) -> Callable[[onnx.ModelProto], None]:
    """Chains permitted operators whose outputs double in size at each node."""

    def change(model: onnx.ModelProto) -> None:
        constant(model, "x0", np.zeros((1, 1024), np.float32))
        nodes = []
        for number in range(22):
            inputs, output = [f"x{number}"] * 2, f"x{number + 1}"
            if kind == "Add":  # broadcasts (n, 1) and (n)
                nodes.append(
                    helper.make_node("Unsqueeze", [inputs[0], constant(model, f"axis{number}", [0])], [f"u{number}"])
                )
                inputs = [f"u{number}", inputs[1]]
            attributes = {"axis": 0} if kind == "Concat" else {}
            nodes.append(helper.make_node(kind, inputs, [output], name=f"double{number}", **attributes))
        at_the_end(model, *nodes, helper.make_node("ReduceMax", ["x22"], ["bomb"], keepdims=0))

    return change


def long_range(model: onnx.ModelProto) -> None:
    """Uses a permitted operator with an unexpected constant."""
    for node in model.graph.node:
        if node.op_type == "Range":
            node.input[1] = constant(model, "many", np.array(1 << 33, np.int64))
            return


def branch(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "Reshape":
            empty = helper.make_graph([], "sub", [], [])
            node.attribute.append(helper.make_attribute("body", empty))
            return


def function(model: onnx.ModelProto) -> None:
    model.functions.append(
        helper.make_function("mine", "f", ["x"], ["y"], [helper.make_node("Identity", ["x"], ["y"])], [])
    )


def another(type: str, field: str, value: Any) -> Callable[[onnx.ModelProto], None]:
    """Changes an attribute of the first node of a type."""

    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == type)
        kept = [each for each in node.attribute if each.name != field]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(field, value)])

    return change


def renamed(field: str, type: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        setattr(next(node for node in model.graph.node if node.op_type == type), field, value)

    return change


def swapped(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Sub")
    node.input[0], node.input[1] = node.input[1], node.input[0]


def tensor(name: str, change: Callable[[onnx.TensorProto], None]) -> Callable[[onnx.ModelProto], None]:
    return lambda model: change(next(each for each in model.graph.initializer if each.name == name))


def shaped(*dims: int) -> Callable[[onnx.TensorProto], None]:
    def change(tensor: onnx.TensorProto) -> None:
        del tensor.dims[:]
        tensor.dims.extend(dims)

    return change


def placed(key: str, value: int) -> Callable[[onnx.TensorProto], None]:
    def change(tensor: onnx.TensorProto) -> None:
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = str(value)

    return change


def sparse(model: onnx.ModelProto) -> None:
    values = helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [1 << 32]))


def unused(model: onnx.ModelProto) -> None:
    constant(model, "unused", np.zeros(100, np.float32))


def default(model: onnx.ModelProto) -> None:
    tensor("num_logits_to_keep", lambda each: each.CopyFrom(numpy_helper.from_array(np.zeros(9, np.int64), each.name)))(
        model
    )


def dropped(model: onnx.ModelProto) -> None:
    del model.graph.node[-1]


def doubled_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("v_positions.Cos_17", TensorProto.FLOAT, None))


def output_twice(model: onnx.ModelProto) -> None:
    model.graph.output.append(model.graph.output[0])


def constant_with_more(model: onnx.ModelProto) -> None:
    """Replaces a tensor with a constant node that has an extra attribute."""
    found = next(each for each in model.graph.initializer if each.name == "const_1_i64")
    node = helper.make_node("Constant", [], [found.name], value=found)
    node.attribute.append(helper.make_attribute("value_int", 3))
    model.graph.initializer.remove(found)
    model.graph.node.insert(0, node)


def swapped_outputs(model: onnx.ModelProto) -> None:
    attend = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    attend[0].output[1], attend[1].output[1] = attend[1].output[1], attend[0].output[1]


EMBEDDING = "model.embed_tokens.weight"
ATTACKS: dict[str, Callable[[onnx.ModelProto], None]] = {
    "a constant of 4 GiB": zeros_of_4_gib,
    "an endless loop": endless_loop,
    "concatenations that double": doubling_chain("Concat"),
    "additions that double": doubling_chain("Add"),
    "products that double": doubling_chain("Mul"),
    "a long range": long_range,
    "a subgraph in an attribute": branch,
    "a function": function,
    "another domain": renamed("domain", "Split", "com.microsoft"),
    "an unknown domain": renamed("domain", "Split", "mine"),
    "an overload": renamed("overload", "Split", "x"),
    "another operator": renamed("op_type", "Cos", "Sin"),
    "another attribute": another("GroupQueryAttention", "smooth_softmax", 1),
    "another value of an attribute": another("GroupQueryAttention", "num_heads", 1 << 20),
    "another type of an attribute": another("Cast", "to", 10),
    "swapped inputs": swapped,
    "swapped outputs": swapped_outputs,
    "no logits": dropped,
    "another output": doubled_output,
    "an output twice": output_twice,
    "a constant with more than a value": constant_with_more,
    "a sparse tensor": sparse,
    "an unused tensor": unused,
    "another default of an input": default,
    "a tensor of another shape": tensor(EMBEDDING, shaped(1 << 30, 64)),
    "a tensor with negative sizes": tensor(EMBEDDING, shaped(-320, -64)),
    "a tensor of another type": tensor(EMBEDDING, lambda each: setattr(each, "data_type", TensorProto.DOUBLE)),
    "a tensor beyond the file": tensor(EMBEDDING, placed("offset", 1 << 40)),
    "a tensor before the file": tensor(EMBEDDING, placed("offset", -4096)),
    "a tensor of another length": tensor(EMBEDDING, placed("length", 4)),
    "a constant outside of the graph": tensor("const_1_i64", lambda each: each.ClearField("raw_data")),
    "a constant of many": tensor("const_1_i64", shaped(1 << 40)),
}


# Graphs with 8-bit caches, and with a head in halves, have subgraphs.


def branch_of(model: onnx.ModelProto, name: str) -> onnx.GraphProto:
    node = next(node for node in model.graph.node if node.op_type == "If")
    graph: onnx.GraphProto = next(each for each in node.attribute if each.name == name).g
    return graph


def both_branches(model: onnx.ModelProto) -> tuple[onnx.GraphProto, onnx.GraphProto]:
    return branch_of(model, "then_branch"), branch_of(model, "else_branch")


def swapped_branches(model: onnx.ModelProto) -> None:
    then, otherwise = both_branches(model)
    kept = onnx.GraphProto()
    kept.CopyFrom(then)
    then.CopyFrom(otherwise)
    otherwise.CopyFrom(kept)


def node_in_a_branch(model: onnx.ModelProto) -> None:
    nodes = branch_of(model, "else_branch").node
    nodes.append(helper.make_node("Concat", [nodes[0].output[0]] * 2, ["more"], axis=0))


def loop_in_a_branch(model: onnx.ModelProto) -> None:
    branch_of(model, "then_branch").node.insert(
        0, helper.make_node("Loop", [], [], body=helper.make_graph([], "", [], []))
    )


def branch_in_a_branch(model: onnx.ModelProto) -> None:
    node = branch_of(model, "else_branch").node[0]
    node.attribute.append(helper.make_attribute("then_branch", helper.make_graph([], "", [], [])))


def tensor_in_a_branch(model: onnx.ModelProto) -> None:
    branch_of(model, "then_branch").initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "mine"))


def moved_between_branches(model: onnx.ModelProto) -> None:
    """Moves the last node of the first branch to the second one. The order of all nodes stays the same."""
    first, second = both_branches(model)
    nodes = [first.node.pop(), *second.node]
    del second.node[:]
    second.node.extend(nodes)


def shorter_branch(model: onnx.ModelProto) -> None:
    del branch_of(model, "else_branch").node[-1]


def other_result(model: onnx.ModelProto) -> None:
    graph = branch_of(model, "else_branch")
    graph.output[0].name = graph.node[0].output[0]


def value_of_another_branch(model: onnx.ModelProto) -> None:
    """The values of a subgraph end with it."""
    then, otherwise = both_branches(model)
    otherwise.output[0].name = then.output[0].name


def swapped_branch_outputs(model: onnx.ModelProto) -> None:
    outputs = branch_of(model, "else_branch").output
    outputs[1].name, outputs[2].name = outputs[2].name, outputs[1].name


def more_candidates(model: onnx.ModelProto) -> None:
    found = (each for each in model.graph.initializer if not each.external_data)
    number = next(each for each in found if numpy_helper.to_array(each).tolist() == [10])
    number.CopyFrom(numpy_helper.from_array(np.array([40]), number.name))


IN_BRANCHES = [
    swapped_branches, node_in_a_branch, loop_in_a_branch, branch_in_a_branch, tensor_in_a_branch, moved_between_branches,
    shorter_branch, other_result, value_of_another_branch,
]  # fmt: skip
ATTACKS_OF: dict[str, list[Callable[[onnx.ModelProto], None]]] = {
    "int8 caches": [*IN_BRANCHES, swapped_branch_outputs, renamed("op_type", "LessOrEqual", "Less")],
    "halves": [*IN_BRANCHES, more_candidates, renamed("op_type", "And", "Or")],
}

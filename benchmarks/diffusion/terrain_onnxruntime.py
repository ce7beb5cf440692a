"""onnxruntime's answer for the terrain U-Net, which the torch evaluator is checked against."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
from onnx import numpy_helper

NATIVE = 128


def session(path: Path, side: int) -> onnxruntime.InferenceSession:
    """The file as it is, or with every constant that says how many tokens there are rewritten.

    Those stand at the end of the shapes that the reshapes around an attention join: `[…, tokens]`, or
    `[…, height, width]` where four sizes are joined. Elsewhere the same constants say something
    else, so the rewritten ones get names of their own.
    """
    model = onnx.load(path)
    if side != NATIVE:
        graph, factor = model.graph, side // NATIVE
        weights = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
        for tensor in (graph.input[0], graph.output[0]):
            for axis in (2, 3):
                tensor.type.tensor_type.shape.dim[axis].dim_value = side
        for node in (x for x in graph.node if x.op_type == "Concat"):
            last = [(2, factor), (3, factor)] if len(node.input) == 4 else [(2, factor * factor)]
            for at, times in last:
                size = weights.get(node.input[at]) if len(node.input) > at else None
                if size is None or size.item() < 0:
                    continue
                name = f"{node.output[0]}_{at}_rewritten"
                graph.initializer.append(numpy_helper.from_array(size * times, name))
                node.input[at] = name
        del graph.value_info[:]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    return onnxruntime.InferenceSession(model.SerializeToString(), options)

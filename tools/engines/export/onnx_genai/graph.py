"""Collecting the nodes and initializers of an ONNX graph."""

from pathlib import Path
from typing import Any

import numpy as np

from .weights import Array

DATA = "model.onnx.data"
MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
_ALIGNMENT = 4096  # so that the runtime can map the file


class Graph:
    """Nodes in the order of execution, and initializers, whose bytes go to the data file in ``folder`` at once."""

    def __init__(self, folder: Path) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._data = (folder / DATA).open("wb")

    def __enter__(self) -> "Graph":
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()

    def node(self, operator: str, inputs: list[str], output: str | list[str], **attributes: Any) -> str:
        """Returns the name of the first output."""
        from onnx import helper

        outputs = [output] if isinstance(output, str) else output
        node = helper.make_node(operator, inputs, outputs, name=f"{outputs[0]}/{operator}", **attributes)
        self.nodes.append(node)
        return outputs[0]

    def constant(self, name: str, values: list[int]) -> str:
        """A small int64 vector, kept in the graph."""
        from onnx import numpy_helper

        self.initializers.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def weight(self, name: str, tensor: Array) -> str:
        """float32, kept in the data file."""
        from onnx import TensorProto

        self._data.seek(-self._data.tell() % _ALIGNMENT, 1)
        offset, tensor = self._data.tell(), np.ascontiguousarray(tensor, np.float32)
        tensor.tofile(self._data)
        entry = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=tensor.shape)
        entry.data_location = TensorProto.EXTERNAL
        for key, value in (("location", DATA), ("offset", offset), ("length", tensor.nbytes)):
            entry.external_data.add(key=key, value=str(value))
        self.initializers.append(entry)
        return name

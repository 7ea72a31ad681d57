"""Collecting the nodes and initializers of an ONNX graph."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .weights import Array

DATA = "model.onnx.data"
MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
_ALIGNMENT = 4096  # so that the runtime can map the file


class Graph:
    """Nodes in the order of execution, and initializers, whose bytes go to the data file in ``folder`` at once.

    Args:
        is_half: floating-point weights are kept as float16 instead of float32.
    """

    def __init__(self, folder: Path, is_half: bool = False) -> None:
        self._float = np.float16 if is_half else np.float32
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

    def zeros(self, shape: str, output: str) -> str:
        """A floating-point tensor of a shape that is known when the model runs."""
        from onnx import numpy_helper

        return self.node("ConstantOfShape", [shape], output, value=numpy_helper.from_array(np.zeros(1, self._float)))

    def weight(self, name: str, tensor: Array) -> str:
        """A floating-point tensor, kept in the data file."""
        return self._stored(name, np.ascontiguousarray(tensor, self._float))

    def packed(self, name: str, tensor: Array) -> str:
        """uint8, kept in the data file."""
        return self._stored(name, np.ascontiguousarray(tensor, np.uint8))

    def same_bytes(self, name: str, of: str, shape: Sequence[int]) -> str:
        """What was kept as ``of``, under another name and in another shape, without more bytes in the data file."""
        from onnx import TensorProto

        entry = TensorProto()
        entry.CopyFrom(next(entry for entry in self.initializers if entry.name == of))
        entry.name, entry.dims[:] = name, shape
        self.initializers.append(entry)
        return name

    def _stored(self, name: str, tensor: Array) -> str:
        from onnx import TensorProto, helper

        self._data.seek(-self._data.tell() % _ALIGNMENT, 1)
        offset = self._data.tell()
        tensor.tofile(self._data)
        data_type = helper.np_dtype_to_tensor_dtype(tensor.dtype)
        entry = TensorProto(name=name, data_type=data_type, dims=tensor.shape)
        entry.data_location = TensorProto.EXTERNAL
        for key, value in (("location", DATA), ("offset", offset), ("length", tensor.nbytes)):
            entry.external_data.add(key=key, value=str(value))
        self.initializers.append(entry)
        return name

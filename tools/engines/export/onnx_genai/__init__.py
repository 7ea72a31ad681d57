"""Exported folder -> a folder for ONNX Runtime GenAI (run with onnxruntime-genai 0.18), with one KV cache an owner.

Imports nothing of ours, so that `runners/run_onnx.py` can use it in a Python that has no skv-dist.
"""

from .folder import DTYPES, check_expressible, export_onnx
from .quantized import bits_of, rounded
from .weights import float32, map_weights

__all__ = ["DTYPES", "bits_of", "check_expressible", "export_onnx", "float32", "map_weights", "rounded"]

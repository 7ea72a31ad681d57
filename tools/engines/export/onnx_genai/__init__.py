"""Exported folder -> a folder for ONNX Runtime GenAI (run with onnxruntime-genai 0.18), with one KV cache an owner.

Imports nothing of ours, so that `runners/run_onnx.py` can use it in a Python that has no skv-dist.
"""

from .folder import check_expressible, export_onnx

__all__ = ["check_expressible", "export_onnx"]

"""The vLLM plugin (entry point group ``vllm.general_plugins``; run with vLLM 0.32): makes K/V sharing save memory.

Without it vLLM runs an exported folder through its Transformers backend, which computes the same and allots a cache to
every layer: nothing is saved.
"""


def register() -> None:
    """Called by vLLM in each of its processes. By name, so that no process imports the model before it is needed."""
    from vllm import ModelRegistry

    ModelRegistry.register_model("SkvForCausalLM", __name__.replace("vllm_plugin", "vllm_model") + ":SkvForCausalLM")

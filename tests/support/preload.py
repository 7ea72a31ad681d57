"""Imported once by the server that forks the processes of tests (`tests.support.processes`)."""

import gc
import os
import warnings

# As launch/common.sh: DeepSpeed reads the first when it is imported, torch the last.
os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
warnings.filterwarnings("ignore")

from skv_dist.parallel.processes import cpu_platform  # noqa: E402

# In this order, as in every run: DeepSpeed keeps torch's functions as they are when it is imported, and puts them back.
cpu_platform.install()

import deepspeed  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralForCausalLM, Qwen3ForCausalLM  # noqa: E402, F401

import skv_dist.checkpoint.save  # noqa: E402
import skv_dist.commands.train  # noqa: E402
import skv_dist.data.batches  # noqa: E402
import skv_dist.evaluation.sweep  # noqa: E402
import skv_dist.parallel.engines.create  # noqa: E402
import skv_dist.parallel.engines.replicated  # noqa: E402
import skv_dist.training.report  # noqa: E402
import skv_dist.training.trainer  # noqa: E402, F401
from skv_dist.parallel.engines import zero  # noqa: E402

# Only norms are small beside the matrices of a toy model: else stage 3 would gather nothing where it is used.
zero.KEPT_WHOLE = 100

# A collection of garbage need not look at all of this again: it would take longer than most jobs.
gc.freeze()

"""llama.cpp's own converter on an exported folder of Gemma 4's block (run with the one in llama-cpp-python 0.3.36).

    python to_gguf.py LLAMA_CPP FOLDER OUT.gguf [--outtype f32]      # LLAMA_CPP: a checkout; f32: one of its types

It reads config.json through transformers, which drops ``global_head_dim`` where it equals ``head_dim``, and then misses
it. Here it reads the file itself. Its Gemma 4 wants a BPE tokenizer with byte fallback and merges, as Gemma's has.
"""

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any

import transformers


def _no_config(*_: Any, **__: Any) -> Any:
    raise ValueError("config.json is read as it is")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--outtype", default="f32")
    arguments = parser.parse_args()
    transformers.AutoConfig.from_pretrained = _no_config
    # The tokenizer's class is looked up through the configuration otherwise.
    transformers.AutoTokenizer.from_pretrained = transformers.PreTrainedTokenizerFast.from_pretrained
    script = arguments.llama_cpp / "convert_hf_to_gguf.py"
    sys.argv = [str(script), str(arguments.folder), "--outtype", arguments.outtype, "--outfile", str(arguments.out)]
    sys.path[:0] = [str(arguments.llama_cpp), str(arguments.llama_cpp / "gguf-py")]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()

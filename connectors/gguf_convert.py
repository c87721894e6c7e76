"""Turns a GGUF file into a Hugging Face directory that vLLM loads: ``python -m`` this module, ``SRC.gguf DST``.

Runs as a child process (:mod:`bidbeam.connectors.model_files` starts it), so that torch and transformers never enter
the process that drives a run. Weights become bfloat16 safetensors; the tokenizer keeps the file's chat template.
"""

from __future__ import annotations

import sys
from pathlib import Path


def convert(source: Path, target: Path) -> None:
    """Reads the GGUF file ``source`` and writes the directory ``target``. Raises what torch and transformers raise."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, name = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name, trust_remote_code=False)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("the file's tokenizer has no fast form, so no tokenizer.json can be written")
    model = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=name, dtype=torch.bfloat16, trust_remote_code=False
    ).bfloat16()
    # The weights are dequantized now: left in place, these marks would make an engine look for quantized ones.
    for holder in (model, model.config):
        for mark in ("quantization_config", "quantization_method", "hf_quantizer", "is_quantized"):
            if hasattr(holder, mark):
                delattr(holder, mark)
    model.save_pretrained(target, safe_serialization=True)
    tokenizer.save_pretrained(target)


def main(arguments: list[str]) -> int:
    """The command. Prints one line saying what went wrong, and returns 1, where the file does not convert."""
    if len(arguments) != 2:
        print("usage: python -m bidbeam.connectors.gguf_convert SRC.gguf DST", file=sys.stderr)
        return 2
    try:
        convert(Path(arguments[0]), Path(arguments[1]))
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A small random-weight Llama with a trained tokenizer and a chat template: a real model, loaded in seconds.

Written by hand rather than through transformers, whose import alone takes longer than the engine's first answer.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import numpy as np

CONTEXT = 2048
VOCAB = 512

_HIDDEN, _INNER, _LAYERS, _HEADS, _HEAD_DIM = 64, 128, 2, 2, 32
_BOS, _EOS = "<|endoftext|>", "<|im_end|>"

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_TEXT = """
Describe the product in two short sentences for a shop's page. Name what it is made of, whom it is for and how it is
cared for. Write plainly, use no exclamation marks, and never promise what the sheet does not say. Answer in English.
The kettle holds 1.7 litres, boils in four minutes and switches itself off. The lamp is brass, 42 cm high, with a linen
shade. Return the answer as JSON: {"name": "kettle", "colour": "red", "price": 19.95, "tags": ["kitchen", "steel"]}.
Classify the ticket as billing, shipping, returns or other. A parcel that has not come after ten days is shipping.
Summarise the report for a reader who has one minute: what happened, why it matters, what is to be done, by whom, when.
"""


def build(directory: Path) -> Path:
    """Writes the model into ``directory`` and returns it. The same model every time."""
    _write_tokenizer(directory)
    _write_weights(directory)
    tokens = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": 1,
        "head_dim": _HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": VOCAB,
        **tokens,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps(tokens))
    return directory


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[_BOS, "<|im_start|>", _EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT.splitlines(), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _BOS,
        "eos_token": _EOS,
        "pad_token": _EOS,
        "model_max_length": CONTEXT,
        "chat_template": _CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text(_CHAT_TEMPLATE)


def _write_weights(directory: Path) -> None:
    from safetensors.numpy import save_file

    random = np.random.default_rng(7)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) * 0.1).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(VOCAB, _HIDDEN), "model.norm.weight": np.ones(_HIDDEN, np.float32)}
    for layer in range(_LAYERS):
        at = f"model.layers.{layer}."
        weights |= {
            f"{at}input_layernorm.weight": np.ones(_HIDDEN, np.float32),
            f"{at}post_attention_layernorm.weight": np.ones(_HIDDEN, np.float32),
            f"{at}mlp.gate_proj.weight": matrix(_INNER, _HIDDEN),
            f"{at}mlp.up_proj.weight": matrix(_INNER, _HIDDEN),
            f"{at}mlp.down_proj.weight": matrix(_HIDDEN, _INNER),
            f"{at}self_attn.q_proj.weight": matrix(_HEADS * _HEAD_DIM, _HIDDEN),
            f"{at}self_attn.k_proj.weight": matrix(_HEAD_DIM, _HIDDEN),
            f"{at}self_attn.v_proj.weight": matrix(_HEAD_DIM, _HIDDEN),
            f"{at}self_attn.o_proj.weight": matrix(_HIDDEN, _HEADS * _HEAD_DIM),
        }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


@functools.cache
def tiny_model() -> str:
    """The directory of the model, built once in this process and gone with it."""
    holder = tempfile.TemporaryDirectory(prefix="bidbeam-tiny-")
    _holders.append(holder)
    return str(build(Path(holder.name)))


_holders: list[tempfile.TemporaryDirectory[str]] = []

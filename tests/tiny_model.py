"""A small random-weight Llama with a trained tokenizer and a chat template: a real model, loaded in seconds."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

CONTEXT = 2048
VOCAB = 1024

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
    """Writes the model into ``directory`` and returns it. Deterministic."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT.splitlines(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|endoftext|>", pad_token="<|im_end|>"
    )
    fast.chat_template = _CHAT_TEMPLATE
    fast.model_max_length = CONTEXT
    fast.save_pretrained(directory)

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@functools.cache
def tiny_model() -> str:
    """The directory of the model, built once in this process and gone with it."""
    holder = tempfile.TemporaryDirectory(prefix="bidbeam-tiny-")
    _holders.append(holder)
    return str(build(Path(holder.name)))


_holders: list[tempfile.TemporaryDirectory[str]] = []

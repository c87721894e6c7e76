"""Sampling keys that look misspelt. Any key goes to the engine as it is, so that nobody else would say so."""

from __future__ import annotations

from collections.abc import Iterator

from bidbeam.connectors.near import near
from bidbeam.pipelines.job import Job
from bidbeam.transforms.sampling import KEYS

_LEAST = 0.75
"""How like a known key another one must be to be told of: what is less like it may be a key of some engine's own."""

KNOWN = frozenset(KEYS) | frozenset(
    # What OpenAI's chats and vLLM take, and what routers and other servers add to it.
    """
    add_generation_prompt add_special_tokens allowed_token_ids audio bad_words best_of cache_salt chat_template
    chat_template_kwargs continue_final_message documents ebnf echo extra_args flat_logprobs frequency_penalty
    function_call functions guided_choice guided_decoding_backend guided_grammar guided_json guided_regex
    guided_whitespace_pattern ignore_eos include_reasoning include_stop_str_in_output json_schema kv_transfer_params
    length_penalty logit_bias logprob_token_ids logprobs max_completion_tokens max_output_tokens metadata min_p
    min_tokens mm_processor_kwargs modalities parallel_tool_calls plugins prediction presence_penalty priority
    prompt_cache_key prompt_cache_retention prompt_logprobs provider reasoning reasoning_effort regex
    repetition_detection repetition_penalty request_id return_token_ids return_tokens_as_token_ids route
    safety_identifier service_tier session_id skip_reading_prefix_cache skip_special_tokens
    spaces_between_special_tokens stop_token_ids store stream stream_options structured_outputs suffix thinking
    thinking_token_budget tool_choice tools top_a top_k top_logprobs transforms truncate_prompt_tokens
    truncation_side typical_p use_beam_search user verbosity vllm_xargs watermarking web_search_options
    """.split()  # noqa: SIM905 - a word list
)


def odd_sampling_keys(job: Job) -> Iterator[str]:
    """A line for each key of the job's sampling that is near a known one but none: where it is, and which."""
    for key in job.sampling:
        meant = None if key in KNOWN else near(key, sorted(KNOWN), least=_LEAST)
        if meant is not None:
            problem = "is no sampling key that is known, and goes to the engine as it is"
            yield str(job.fault(f"sampling.{key}", problem, nearest=meant))

"""The parameters of sampling, where scripts for vLLM look for them."""

from ferry.engines.parameters import GuidedDecodingParams, SamplingParams, StructuredOutputsParams

__all__ = ["GuidedDecodingParams", "SamplingParams", "StructuredOutputsParams"]

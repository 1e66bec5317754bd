"""Everything that knows the insides of vLLM."""

KEY = "steer"
"""Under which a program travels in `SamplingParams.extra_args`, the sites in vLLM's `additional_config`, and reports
in `EngineCoreOutput.kv_transfer_params`."""

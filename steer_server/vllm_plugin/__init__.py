"""Everything that knows the insides of vLLM."""

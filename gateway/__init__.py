"""Pure. The public Python surface, in the shape of `ray.serve.llm`: LLMConfig, build_openai_app, run."""

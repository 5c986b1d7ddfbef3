"""Shell. What structured output may cost the engine, and what becomes of an answer beyond it."""

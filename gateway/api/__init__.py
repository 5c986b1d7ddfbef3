"""Pure. The OpenAI API: chat, completions, models."""

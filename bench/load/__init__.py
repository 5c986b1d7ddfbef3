"""Pure. The HTTP load test for any OpenAI-compatible server."""

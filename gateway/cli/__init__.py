"""Pure. The `loraplex` command."""

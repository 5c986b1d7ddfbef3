"""Shell. Requests that workers die of: how the innocent are told from them."""

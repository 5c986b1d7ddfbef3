"""Pure. HTTP on the wire: connections, parsing, headers, response bytes."""

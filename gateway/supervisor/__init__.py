"""Pure. Processes of one machine: `serve` starts gateways and workers and keeps them alive."""

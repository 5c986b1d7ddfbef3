"""Pure. A configuration file as text: YAML, Kubernetes manifests, variables of the environment."""

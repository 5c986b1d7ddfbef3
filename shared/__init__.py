"""Pure. What the gateway and the workers share: messages, config, names, errors, and the two doors
to the outside (link, stores).
"""

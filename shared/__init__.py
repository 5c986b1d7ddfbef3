"""Pure. What the gateway and the workers share: messages, config, names, errors, and the two places
where data leaves the process (link and stores).
"""

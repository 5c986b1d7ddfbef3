"""Pure. The Prometheus series that gateway processes count, each with its help text and its labels.
Label values are bounded: base models of the config, fixed words, live workers, and so many
adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

TTFT_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30, 60)
DURATION_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640)
ADAPTER_LABELS = 200
"""Adapters that get a series of their own in each gateway process, in the order in which they come.
All others are summed under `_other`.
"""
USAGE_LABELS = 500
"""The same bound for the pairs of key and adapter in the usage series."""
OTHER = "_other"
LOST_REASONS = (
    *("off", "not_journaled", "too_long", "no_memory", "contradicted", "answered_otherwise"),
    *("stored_there", "refused", "retry_budget", "attempts", "no_worker"),
)
"""Why an answer can break off (see dispatch). They are shown from the start: Prometheus sees no
increase where a series begins.
"""

COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "requests": ("Requests ended, by how they ended.", ("base", "outcome")),
    "adapter_requests": ("Requests ended, by adapter.", ("base", "adapter")),
    "dispatched": ("Requests given to a worker, by the reason of the choice.", ("base", "reason")),
    "error_responses": ("Errors answered by the gateway itself, by code.", ("code",)),
    "prompt_tokens": ("Prompt tokens of ended requests.", ("base",)),
    "output_tokens": ("Output tokens of ended requests.", ("base",)),
    "undecodable_messages": ("Messages from workers that were dropped.", ("socket",)),
    "retries": ("Requests sent to another worker before their first byte.", ()),
    "internal_errors": ("Requests that failed because code of the gateway raised.", ()),
    "reservation_repairs": ("Reservations and requests that had lost each other.", ()),
    "streams_moved": (
        "Answers that another worker continued, by what ended the one before.",
        ("reason",),
    ),
    "streams_lost": (
        "Answers that broke off, by why no other worker could continue them.",
        ("reason",),
    ),
    "link_gaps": ("Times that a message from a worker was missing and asked for again.", ()),
    "link_resent": ("Messages that were sent to a worker again.", ()),
    "config_reloads": (
        "Changes of the config file that were taken, or refused because of a mistake.",
        ("outcome",),
    ),
    "slow_readers": ("Clients cut off because they did not read.", ()),
    "adapter_version_changes": (
        "New adapter versions: switched to, refused, or not ready yet.",
        ("base", "outcome"),
    ),
    "alias_requests": (
        "Requests by alias and the share that answered.",
        ("base", "alias", "adapter", "outcome"),
    ),
    "key_requests": (
        "Requests ended, or not let in, by key and how they ended.",
        ("key", "outcome"),
    ),
    "limits_hit": (
        "Requests that were turned away because their key had reached a limit.",
        ("key", "limit"),
    ),
    "usage_requests": ("Requests that used tokens, by key.", ("key", "base", "adapter")),
    "usage_prompt_tokens": ("Prompt tokens, by key.", ("key", "base", "adapter")),
    "usage_output_tokens": (
        "Output tokens by key, also of answers whose client left.",
        ("key", "base", "adapter"),
    ),
    "alias_rollbacks": ("Shares of aliases that were rolled back.", ("base", "alias")),
}
GEN_AI_LABELS = ("gen_ai_operation_name", "gen_ai_request_model")
DISTRIBUTIONS: dict[str, tuple[str, tuple[str, ...], Sequence[float]]] = {
    "ttft_seconds": (
        "Time from a request's arrival to its first bytes; of an answer that is not streamed, to "
        "its end.",
        ("base", "cold", "streamed"),
        TTFT_BUCKETS_S,
    ),
    "queue_seconds": ("Time from a request's arrival to its dispatch.", ("base",), TTFT_BUCKETS_S),
    "ttft_over_expected": (
        "Time from dispatch to first bytes, over what routing had expected.",
        ("base",),
        (0.1, 0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0, 10.0),
    ),
    "request_seconds": ("Time from a request's arrival to its end.", ("base",), DURATION_BUCKETS_S),
    "gen_ai_server_request_duration_seconds": (
        "gen_ai.server.request.duration, with traces alone.",
        GEN_AI_LABELS,
        (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
    ),
    "gen_ai_server_time_to_first_token_seconds": (
        "gen_ai.server.time_to_first_token, with traces alone.",
        GEN_AI_LABELS,
        (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
    ),
    "gen_ai_server_time_per_output_token_seconds": (
        "gen_ai.server.time_per_output_token, with traces alone.",
        GEN_AI_LABELS,
        (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5),
    ),
}
GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "queue_depth": ("Requests that wait for a worker in one gateway process.", ("base", "process")),
    "ongoing_requests": (
        "Requests of one gateway process that wait or run: the load that scaling looks at.",
        ("base", "process"),
    ),
    "journal_bytes": (
        "Memory of one gateway process for the tokens that clients of open streams have seen.",
        ("process",),
    ),
    "live_listeners": (
        "Pages at /ui and terminals with `loraplex top` that are open.",
        ("process",),
    ),
    "gateway_tasks": ("asyncio tasks of one gateway process.", ("process",)),
}
BOUNDS = {name: bounds for name, (_, _, bounds) in DISTRIBUTIONS.items()}

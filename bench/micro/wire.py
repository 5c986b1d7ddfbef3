"""Shell. `python -m bench.micro.wire`: what the messages between gateway and worker cost to write and to read."""

from __future__ import annotations

from bench.micro.timing import show
from shared import wire
from shared.adapters import AdapterRef

STREAMS = 64
EVENT = b'data: {"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1,"model":"base","choices":[' + (
    b'{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
)
BODY = b'{"model":"base:adapter","messages":[{"role":"user","content":"' + b"word " * 400 + b'"}],"max_tokens":64,"stream":true}'
RESIDENT = 64


def main() -> None:
    step = wire.Step([(sid, 0, EVENT) for sid in range(STREAMS)])
    one = wire.Step([(1, 0, EVENT)])
    generate = wire.Generate(1, "/v1/chat/completions", "0" * 32, BODY, AdapterRef("base", "adapter", "0" * 64))
    adapters = tuple(wire.AdapterState(f"adapter-{i:04d}", "0" * 64, wire.Tier.GPU) for i in range(RESIDENT))
    beat = wire.Heartbeat("w0", 1, 1, "base", wire.WorkerState.SERVING, adapters=adapters)
    sent = {name: wire.encode(m) for name, m in (("step", step), ("one", one), ("generate", generate), ("beat", beat))}
    show(
        "Messages between gateway and worker",
        {
            f"step of {STREAMS} streams, encode": (lambda: wire.encode(step), STREAMS, "token"),
            f"step of {STREAMS} streams, decode": (lambda: wire.decode_worker_data(sent["step"]), STREAMS, "token"),
            "step of one stream, encode": (lambda: wire.encode(one), 1, "token"),
            "step of one stream, decode": (lambda: wire.decode_worker_data(sent["one"]), 1, "token"),
            f"request of {len(BODY):,} bytes, encode": (lambda: wire.encode(generate), 1, "request"),
            f"request of {len(BODY):,} bytes, decode": (lambda: wire.decode_gateway_data(sent["generate"]), 1, "request"),
            f"heartbeat with {RESIDENT} adapters, encode": (lambda: wire.encode(beat), RESIDENT, "adapter"),
            f"heartbeat with {RESIDENT} adapters, decode": (lambda: wire.decode_worker_control(sent["beat"]), RESIDENT, "adapter"),
        },
    )


if __name__ == "__main__":
    main()

// A page's fetch that answers with 1,000 adapters on 64 workers, which no test could start. Every
// quarter of a second an event says that adapters have moved, four times as often as a gateway
// does.
(() => {
  const two = (n) => String(n).padStart(4, "0");
  const adapters = [...Array(1000).keys()].map((n) => ({
    base: "sim",
    name: "a" + two(n),
    hits: 0,
    state: "listed",
  }));
  const worker = (n) => ({
    id: "w" + n,
    base: "sim",
    host: "h",
    epoch: 1,
    state: "serving",
    reason: "",
    load: 0,
    running: 0,
    waiting: 0,
    capacity: 8,
    slots: 16,
    slots_loaded: 16,
    slots_busy: 0,
    kv_usage: 0,
    step_ms: 1,
    load_ms: 1,
    stall_ms: 1,
    prefill_tokens_per_s: 1,
    loads: 0,
    restarts: 0,
    moved: 0,
  });
  const workers = [...Array(64).keys()].map(worker);
  const heldAt = (turn) =>
    Object.fromEntries(
      workers.map((w, n) => [
        w.id,
        [...Array(100).keys()].map((m) => [
          "a" + two((n * 16 + m + turn) % 1000),
          ["gpu", "cpu", "disk"][m % 3],
          m % 17 === 0,
          m % 11 === 0,
          m % 5,
          0.5,
        ]),
      ]),
    );
  const eventAt = (turn) => ({
    at: 1 + turn,
    policy: "p",
    open_requests: turn,
    workers,
    scaling: { supervisor: true, models: {} },
    requests: [],
    held: heldAt(turn),
    held_is_whole: true,
  });
  const real = window.fetch;
  const said = (turn) =>
    new TextEncoder().encode("data: " + JSON.stringify(eventAt(turn)) + "\n\n");
  window.turns = 0;
  const stream = () => {
    let timer;
    return new ReadableStream({
      start: (c) => {
        c.enqueue(said(0));
        timer = setInterval(() => c.enqueue(said(++window.turns)), 250);
      },
      cancel: () => clearInterval(timer),
    });
  };
  window.fetch = (url, more) =>
    String(url).startsWith("/admin/adapters?")
      ? Promise.resolve(new Response(JSON.stringify({ adapters, next: null })))
      : String(url).startsWith("/admin/live")
        ? Promise.resolve(new Response(stream()))
        : real(url, more);
  return 1;
})();

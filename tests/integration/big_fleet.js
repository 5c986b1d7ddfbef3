// A page's fetch that answers with 1,000 adapters on 64 workers, which no test could start.
(() => {
  const two = (n) => String(n).padStart(4, "0");
  const adapters = [...Array(1000).keys()].map((n) => ({base: "sim", name: "a" + two(n), hits: 0, state: "listed", workers: []}));
  const worker = (n) => ({id: "w" + n, base: "sim", host: "h", epoch: 1, state: "serving", reason: "", load: 0, running: 0, waiting: 0,
    capacity: 8, slots: 16, slots_loaded: 16, slots_busy: 0, kv_usage: 0, step_ms: 1, load_ms: 1, stall_ms: 1, prefill_tokens_per_s: 1});
  const workers = [...Array(64).keys()].map(worker);
  const held = Object.fromEntries(workers.map((w, n) => [w.id, [...Array(100).keys()].map((m) => ["a" + two((n * 16 + m) % 1000), "gpu", false, false, 0, 0])]));
  const event = {at: 1, policy: "p", open_requests: 0, workers, scaling: {supervisor: true, models: {}}, requests: [], held};
  const real = window.fetch;
  window.fetch = (url, more) => String(url).startsWith("/admin/adapters?") ? Promise.resolve(new Response(JSON.stringify({adapters, next: null})))
    : String(url).startsWith("/admin/live") ? Promise.resolve(new Response(new ReadableStream({start: (c) => c.enqueue(new TextEncoder().encode("data: " + JSON.stringify(event) + "\n\n"))})))
    : real(url, more);
  return 1;
})()

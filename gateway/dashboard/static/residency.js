// Adapters x workers. Only the rows in sight are in the document, so thousands scroll smoothly.
import { html, useEffect, useRef, useState } from "/ui/vendor/htm-preact.js";
import { get, post } from "/ui/api.js";
import { count, ms, Note } from "/ui/parts.js";

const ROW_PX = 28;
const PAGES = 10; // of 1,000 adapters each
const AGAIN_MS = 10000;
const MARKS = { gpu: "G", cpu: "H", disk: "D", remote: "" };
const TIERS = { gpu: "in a slot", cpu: "in host memory", disk: "on disk", remote: "not here" };

async function listing() {
  const rows = [];
  let after = "";
  for (let page = 0; page < PAGES && after !== null; page += 1) {
    const found = await get(`/admin/adapters?after=${encodeURIComponent(after)}`);
    rows.push(...found.adapters);
    after = found.next;
  }
  return rows;
}

function cellOf(held) {
  if (!held) return { kind: "none", mark: "", said: "not here" };
  const [, tier, loading, pinned, inFlight, etaS] = held;
  if (loading) return { kind: "loading", mark: "…", said: `loading from ${tier}, ${etaS} s left` };
  const said = `${TIERS[tier]}${pinned ? ", pinned" : ""}${inFlight ? `, ${inFlight} in flight` : ""}`;
  return { kind: `${tier}${pinned ? " pinned" : ""}`, mark: inFlight ? String(Math.min(99, inFlight)) : pinned ? "P" : MARKS[tier], said };
}

const Cell = ({ worker, held }) => {
  const { kind, mark, said } = cellOf(held);
  return html`<span role="cell" class=${`cell ${kind}`} title=${`${worker}: ${said}`} aria-label=${`${worker}: ${said}`}>${mark}</span>`;
};

export const Residency = ({ live }) => {
  const [rows, setRows] = useState([]);
  const [search, setSearch] = useState("");
  const [top, setTop] = useState(0);
  const [opened, open] = useState(null);
  const [error, setError] = useState("");
  const frame = useRef(0);
  useEffect(() => {
    let going = true, timer = 0;
    const look = () => listing().then((found) => { if (going) { setRows(found); setError(""); } }, (exc) => going && setError(exc.message))
      .finally(() => { if (going) timer = setTimeout(look, AGAIN_MS); });
    look();
    return () => { going = false; clearTimeout(timer); };
  }, []);
  const sought = search.toLowerCase();
  const shown = rows.filter((r) => `${r.base}:${r.name}`.toLowerCase().includes(sought))
    .sort((a, b) => b.hits - a.hits || (a.name < b.name ? -1 : 1));
  const height = 480, first = Math.max(0, Math.floor(top / ROW_PX) - 5);
  const inSight = shown.slice(first, first + Math.ceil(height / ROW_PX) + 10);
  const workers = live.workers;
  const held = (w, r) => r.base === w.base && live.held[w.id]?.get(r.name);
  const scrolled = (event) => {
    const at = event.target.scrollTop;
    cancelAnimationFrame(frame.current);
    frame.current = requestAnimationFrame(() => setTop(at));
  };
  return html`<h2>Residency</h2>
  <div class="tools"><label>Search <input id="search" type="search" value=${search} onInput=${(e) => { setSearch(e.target.value); setTop(0); }} /></label>
    <span id="matched" role="status">${count(shown.length)} adapters, ${workers.length} workers</span></div>
  <ul class="legend"><li><span class="cell gpu">G</span>slot</li><li><span class="cell gpu pinned">P</span>pinned</li><li><span class="cell gpu">3</span>in flight</li>
    <li><span class="cell loading">…</span>loading</li><li><span class="cell cpu">H</span>host memory</li><li><span class="cell disk">D</span>disk</li></ul>
  <${Note} text=${error} bad />
  <div class="matrix" role="table" aria-label="Adapters by worker" aria-rowcount=${shown.length} tabindex="0" onScroll=${scrolled}>
    <div class="line head" role="row"><span role="columnheader" class="name">Adapter</span><span role="columnheader" class="hits">Requests</span><span role="columnheader" class="in-state">State</span>
      ${workers.map((w) => html`<span role="columnheader" class="cell top" title=${w.id}>${w.id}</span>`)}</div>
    <div class="all" role="rowgroup" style=${{ height: `${shown.length * ROW_PX}px` }}>
      <div class="some" style=${{ transform: `translateY(${first * ROW_PX}px)` }}>
      ${inSight.map((r) => html`<div class="line" role="row" key=${`${r.base}:${r.name}`} data-adapter=${r.name}>
        <span role="rowheader" class="name"><button class="link" onClick=${() => open(r)}>${r.name}</button></span>
        <span role="cell" class="hits">${count(r.hits)}</span><span role="cell" class=${`in-state ${r.state}`}>${r.state}</span>
        ${workers.map((w) => html`<${Cell} worker=${w.id} held=${held(w, r)} />`)}</div>`)}
      </div></div></div>
  ${rows.length ? null : html`<p>No adapters yet: put folders into the store, or ask for one.</p>`}
  ${opened ? html`<${Adapter} key=${`${opened.base}:${opened.name}`} base=${opened.base} name=${opened.name} close=${() => open(null)} />` : null}`;
};

const median = (values) => (values.length ? [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)] : null);

const Adapter = ({ base, name, close }) => {
  const [found, setFound] = useState(null);
  const [requests, setRequests] = useState([]);
  const [said, setSaid] = useState({ text: "", bad: false });
  const path = `/admin/adapters/${name.split("/").map(encodeURIComponent).join("/")}`;
  const query = `?base=${encodeURIComponent(base)}`;
  const look = async () => {
    try {
      setFound(await get(path + query));
      setRequests((await get(`/admin/requests?limit=500&adapter=${encodeURIComponent(`${base}:${name}`)}`)).requests);
    } catch (exc) { setSaid({ text: exc.message, bad: true }); }
  };
  useEffect(() => { look(); }, []);
  const act = async (action) => {
    setSaid({ text: `${action} …`, bad: false });
    try {
      const done = action === "load"
        ? await post("/v1/load_lora_adapter", { lora_name: `${base}:${name}`, load_inplace: true })
        : await post(`${path}/${action}${query}`);
      const results = (done.said.results ?? []).map((r) => `${r.worker}: ${r.ok ? "done" : r.error?.message ?? r.message ?? "failed"}`);
      const why = typeof done.said === "string" ? done.said : done.said.error?.message ?? "";
      setSaid({ text: `${action}: ${done.ok ? "done" : "failed"}. ${results.join("; ") || why}`, bad: !done.ok });
    } catch (exc) { setSaid({ text: exc.message, bad: true }); }
    look();
  };
  const cold = requests.filter((r) => r.ttft_ms !== null && r.phases_ms.load > 0).map((r) => r.ttft_ms);
  const warm = requests.filter((r) => r.ttft_ms !== null && !(r.phases_ms.load > 0)).map((r) => r.ttft_ms);
  const tiers = ["gpu", "cpu", "disk", "remote"].map((t) => [t, requests.filter((r) => r.tier === t).length]);
  return html`<section class="panel" id="adapter" aria-label=${`Adapter ${name}`}>
    <header><h3>${base}:${name}</h3><button onClick=${close} aria-label="Close">✕</button></header>
    <div class="tools">${["pin", "unpin", "prefetch", "evict", "load"].map((a) => html`<button data-action=${a} onClick=${() => act(a)}>${a}</button>`)}</div>
    <${Note} text=${said.text} bad=${said.bad} />
    ${found ? html`<dl>
      <dt>State</dt><dd>${found.state}</dd>
      ${found.reason ? html`<dt>Refused</dt><dd>${found.code}: ${found.reason}</dd>` : null}
      <dt>Version</dt><dd><code>${(found.digest ?? "–").slice(0, 12)}</code>${found.update ? ` (${found.update}; ${(found.serving ?? "").slice(0, 12)} is served)` : ""}</dd>
      <dt>Size</dt><dd>${count(found.bytes)} bytes, rank ${found.rank ?? "–"}</dd>
      <dt>Pinned</dt><dd>${found.to_be_pinned === "everywhere" ? "everywhere" : found.to_be_pinned.join(", ") || "nowhere"}</dd>
      <dt>Requests</dt><dd>${count(found.hits)}, last ${found.last_used ?? "never"}</dd>
      <dt>First token, median</dt><dd>warm ${ms(median(warm))} (${warm.length}), cold ${ms(median(cold))} (${cold.length})</dd>
      <dt>Found at its choice</dt><dd>${tiers.map(([t, n]) => `${TIERS[t]} ${n}`).join(", ")}</dd>
      <dt>On</dt><dd>${found.workers.map((w) => `${w.worker}: ${w.loading ? "loading" : TIERS[w.tier]}${w.pinned ? ", pinned" : ""}`).join("; ") || "no worker"}</dd></dl>` : null}</section>`;
};

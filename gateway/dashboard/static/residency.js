// Adapters x workers. Only the rows in sight are in the document, so thousands scroll smoothly.
import { html, useEffect, useMemo, useRef, useState } from "/ui/vendor/htm-preact.js";
import { get, post } from "/ui/api.js";
import { bytes, count, ms, Note, Panel, plural, useEvery } from "/ui/parts.js";

const ROW_PX = 28;
const PAGES = 10; // of 1,000 adapters each
const AGAIN_MS = 10000;
const MARKS = { gpu: "G", cpu: "H", disk: "D", remote: "" };
const QUERY = "&workers=0"; // the matrix knows from the stream where each is
const TIERS = { gpu: "in a slot", cpu: "in host memory", disk: "on disk", remote: "not here" };

/** The first adapters by their names, and whether there are more. */
async function listing() {
  const rows = [];
  let after = "";
  for (let page = 0; page < PAGES && after !== null; page += 1) {
    const found = await get(`/admin/adapters?after=${encodeURIComponent(after)}${QUERY}`);
    rows.push(...found.adapters);
    after = found.next;
  }
  return { rows, more: after !== null };
}

const NOT_HERE = { kind: "none", mark: "", said: "not here" };
const ON_DISK = { kind: "none disk", mark: MARKS.disk, said: TIERS.disk };

/** The share of each load that is done, from the longest time that was left of it. */
const begun = new Map();
function progress(worker, name, etaS) {
  const key = `${worker} ${name}`,
    most = Math.max(begun.get(key) ?? 0, etaS);
  if (begun.size > 5000) begun.clear();
  begun.set(key, most);
  return most > 0 ? Math.round(100 * (1 - etaS / most)) : 0;
}

function cellOf(worker, held, onDisk) {
  if (!held) return onDisk ? ON_DISK : NOT_HERE;
  const [name, tier, loading, pinned, inFlight, etaS] = held;
  if (loading) {
    const done = progress(worker, name, etaS);
    return {
      kind: "loading",
      mark: "↓",
      done,
      said:
        `loading from ${tier === "remote" ? "the store" : tier}, ` +
        `${done} % done, ${ms(etaS * 1000)} left`,
    };
  }
  begun.delete(`${worker} ${name}`);
  const busy = inFlight ? `, ${inFlight} in flight` : "";
  const said = `${TIERS[tier]}${pinned ? ", pinned" : ""}${busy}`;
  return {
    kind: `${tier}${pinned ? " pinned" : ""}${inFlight ? " busy" : ""}`,
    mark: inFlight ? String(Math.min(99, inFlight)) : pinned ? "P" : MARKS[tier],
    said,
  };
}

const Cell = ({ worker, held, onDisk }) => {
  const { kind, mark, said, done } = cellOf(worker, held, onDisk);
  return html`<span
    role="cell"
    class=${`cell ${kind}`}
    style=${done === undefined ? undefined : { "--done": `${done}%` }}
    title=${`${worker}: ${said}`}
    aria-label=${`${worker}: ${said}`}
    >${mark}</span
  >`;
};

export const Residency = ({ live }) => {
  const [listed, setListed] = useState({ rows: null, more: false });
  const [search, setSearch] = useState("");
  const [top, setTop] = useState(0);
  const [opened, open] = useState(null);
  const [error, setError] = useState("");
  const frame = useRef(0);
  useEvery(
    AGAIN_MS,
    (isCurrent) =>
      listing().then(
        (found) => {
          if (isCurrent()) {
            setListed(found);
            setError("");
          }
        },
        (exc) => isCurrent() && setError(exc.message),
      ),
    [],
  );
  const { rows, more } = listed;
  const shown = useMemo(() => {
    const sought = search.toLowerCase();
    return (rows ?? [])
      .filter((r) => `${r.base}:${r.name}`.toLowerCase().includes(sought))
      .sort((a, b) => b.hits - a.hits || (a.name < b.name ? -1 : 1));
  }, [rows, search]);
  const height = 480,
    first = Math.max(0, Math.floor(top / ROW_PX) - 5);
  const inSight = shown.slice(first, first + Math.ceil(height / ROW_PX) + 10);
  const workers = live.workers;
  const held = (w, r) => r.base === w.base && live.held[w.id]?.get(r.name);
  // the files lie on the host's disk, for all its workers
  const onDisk = (w, r) => r.base === w.base && r.on_disk?.includes(w.host);
  const scrolled = (event) => {
    const at = event.target.scrollTop;
    cancelAnimationFrame(frame.current);
    frame.current = requestAnimationFrame(() => setTop(at));
  };
  return html`<h2>Residency</h2>
    <div class="tools">
      <label
        >Search${" "}
        <input
          id="search"
          type="search"
          value=${search}
          onInput=${(e) => {
            setSearch(e.target.value);
            setTop(0);
          }}
      /></label>
      <span id="matched" role="status"
        >${
          more
            ? `${count(shown.length)} of the first ${count(rows.length)} adapters by name`
            : plural(shown.length, "adapter")
        }, ${plural(workers.length, "worker")}</span
      >
    </div>
    <ul class="legend">
      <li><span class="cell gpu">G</span>slot</li>
      <li><span class="cell gpu pinned">P</span>pinned</li>
      <li><span class="cell gpu busy">3</span>requests in flight</li>
      <li><span class="cell loading half">↓</span>loading</li>
      <li><span class="cell cpu">H</span>host memory</li>
      <li><span class="cell disk">D</span>disk</li>
    </ul>
    <${Note} text=${error} bad />
    <div
      class="matrix"
      role="table"
      aria-label="Adapters by worker"
      aria-rowcount=${shown.length}
      tabindex="0"
      onScroll=${scrolled}
    >
      <div class="line head" role="row">
        <span role="columnheader" class="name">Adapter</span
        ><span role="columnheader" class="hits">Requests</span
        ><span role="columnheader" class="in-state">State</span>
        ${workers.map(
          (w) => html`<span role="columnheader" class="cell top" title=${w.id}>${w.id}</span>`,
        )}
      </div>
      <div class="all" role="rowgroup" style=${{ height: `${shown.length * ROW_PX}px` }}>
        <div class="some" style=${{ transform: `translateY(${first * ROW_PX}px)` }}>
          ${inSight.map(
            (r) =>
              html`<div class="line" role="row" key=${`${r.base}:${r.name}`} data-adapter=${r.name}>
                <span role="rowheader" class="name"
                  ><button class="link" title=${r.name} onClick=${() => open(r)}>
                    ${r.name}
                  </button></span
                >
                <span role="cell" class="hits">${count(r.hits)}</span
                ><span role="cell" class=${`in-state ${r.state}`}>${r.state}</span>
                ${workers.map(
                  (w) =>
                    html`<${Cell} worker=${w.id} held=${held(w, r)} onDisk=${onDisk(w, r)} />`,
                )}
              </div>`,
          )}
        </div>
      </div>
    </div>
    ${
      rows === null
        ? error
          ? null
          : html`<p class="dim">Looking …</p>`
        : rows.length
          ? shown.length
            ? null
            : html`<p class="empty">
                No adapter${more ? " of these" : ""} has “${search}” in its name.
              </p>`
          : html`<p class="empty">
              No adapters yet: put folders into the store, or ask for one by its name.
            </p>`
    }
    ${
      opened
        ? html`<${Adapter}
            key=${`${opened.base}:${opened.name}`}
            base=${opened.base}
            name=${opened.name}
            close=${() => open(null)}
          />`
        : null
    }`;
};

const median = (values) =>
  values.length ? [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)] : null;
const isCold = (r) => r.phases_ms.load + r.phases_ms.fetch + r.phases_ms.check > 0;
const rate = (n, spanS) =>
  spanS >= 1
    ? `${Number((n / Math.max(1, spanS / 60)).toFixed(1))} a minute ` +
      `over the last ${Math.max(1, Math.round(spanS / 60))} min`
    : "–";
const ACTIONS = {
  pin: "Pin",
  unpin: "Unpin",
  prefetch: "Prefetch",
  evict: "Evict",
  reload: "Reload",
};

async function perform(action, base, name, path, query) {
  const done =
    action === "reload"
      ? await post("/v1/load_lora_adapter", { lora_name: `${base}:${name}`, load_inplace: true })
      : await post(`${path}/${action}${query}`);
  const results = (done.said.results ?? []).map(
    (r) => `${r.worker}: ${r.ok ? "done" : (r.error?.message ?? r.message ?? "failed")}`,
  );
  const why = typeof done.said === "string" ? done.said : (done.said.error?.message ?? "");
  return {
    text: `${action}: ${done.ok ? "done" : "failed"}. ${results.join("; ") || why}`,
    bad: !done.ok,
  };
}

/** The versions that workers hold: digest and who has it. */
function versions(found) {
  const on = new Map();
  for (const w of found.workers) on.set(w.digest, [...(on.get(w.digest) ?? []), w.worker]);
  return (
    [...on]
      .map(([digest, workers]) => `${digest.slice(0, 12)} on ${workers.join(", ")}`)
      .join("; ") || "on no worker"
  );
}

const wantedOn = (workers) => {
  if (workers === "everywhere") return "wanted everywhere";
  return workers.length ? `wanted on ${workers.join(", ")}` : "none wanted";
};
const heldAs = (w) => {
  const busy = w.in_flight ? `, ${w.in_flight} in flight` : "";
  return `${w.worker}: ${w.loading ? "loading" : TIERS[w.tier]}${busy}`;
};

const Facts = ({ found, requests }) => {
  const seen = requests.filter((r) => r.ttft_ms !== null);
  const cold = seen.filter(isCold).map((r) => r.ttft_ms),
    warm = seen.filter((r) => !isCold(r)).map((r) => r.ttft_ms);
  const tiers = ["gpu", "cpu", "disk", "remote"].map(
    (t) => `${TIERS[t]} ${requests.filter((r) => r.tier === t).length}`,
  );
  const pinned = found.workers.filter((w) => w.pinned).map((w) => w.worker);
  return html`<dl>
    <dt>State</dt>
    <dd>
      <span class=${`state ${found.state}`}>${found.state}</span
      >${found.in_store ? "" : " (not in the store any more)"}
    </dd>
    ${
      found.reason
        ? html`<dt>Refused</dt>
            <dd class="bad-text">${found.code}: ${found.reason}</dd>`
        : null
    }
    <dt>Newest version</dt>
    <dd>
      <code>${(found.digest ?? "–").slice(0, 12)}</code
      >${found.update ? ` (${found.update}; ${(found.serving ?? "").slice(0, 12)} is served)` : ""}
    </dd>
    <dt>Versions held</dt>
    <dd>${versions(found)}</dd>
    <dt>Size</dt>
    <dd>${bytes(found.bytes)}, rank ${found.rank ?? "–"}</dd>
    <dt>Pins</dt>
    <dd>
      ${wantedOn(found.to_be_pinned)};${" "}
      ${pinned.length ? `pinned on ${pinned.join(", ")}` : "pinned nowhere"}
    </dd>
    <dt>Requests</dt>
    <dd>
      ${count(found.hits)} in all, ${rate(found.traffic.requests, found.traffic.span_s)};
      the last${" "}
      ${found.last_used ? new Date(found.last_used).toLocaleString() : "never"}
    </dd>
    <dt>First token, median</dt>
    <dd>
      warm ${ms(median(warm))} (${plural(warm.length, "request")}), cold ${ms(median(cold))}${" "}
      (${plural(cold.length, "request")})
    </dd>
    <dt>Where requests found it</dt>
    <dd>${tiers.join(", ")}; of the last ${count(requests.length)}</dd>
    <dt>On</dt>
    <dd>${found.workers.map(heldAs).join("; ") || "no worker"}</dd>
    <dt>On disk of</dt>
    <dd>
      ${found.on_disk.map((host) => host.slice(0, 10)).join(", ") || "no host, as far as known"}
    </dd>
  </dl>`;
};

const Adapter = ({ base, name, close }) => {
  const [found, setFound] = useState(null);
  const [requests, setRequests] = useState([]);
  const [said, setSaid] = useState({ text: "", bad: false });
  const path = `/admin/adapters/${name.split("/").map(encodeURIComponent).join("/")}`;
  const query = `?base=${encodeURIComponent(base)}`;
  const look = async () => {
    try {
      setFound(await get(path + query));
      setRequests(
        (await get(`/admin/requests?limit=500&adapter=${encodeURIComponent(`${base}:${name}`)}`))
          .requests,
      );
    } catch (exc) {
      setSaid({ text: exc.message, bad: true });
    }
  };
  useEffect(() => {
    look();
  }, []);
  const act = async (action) => {
    setSaid({ text: `${action} …`, bad: false });
    try {
      setSaid(await perform(action, base, name, path, query));
    } catch (exc) {
      setSaid({ text: exc.message, bad: true });
    }
    look();
  };
  return html`<${Panel} id="adapter" title=${`${base}:${name}`} close=${close}>
    <div class="tools">
      ${Object.entries(ACTIONS).map(
        ([a, word]) => html`<button data-action=${a} onClick=${() => act(a)}>${word}</button>`,
      )}
    </div>
    <${Note} text=${said.text} bad=${said.bad} />
    ${
      found
        ? html`<${Facts} found=${found} requests=${requests} />`
        : said.bad
          ? null
          : html`<p class="dim">Looking …</p>`
    }<//
  >`;
};

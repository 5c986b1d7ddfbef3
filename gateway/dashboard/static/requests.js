import { html, useEffect, useState } from "/ui/vendor/htm-preact.js";
import { get } from "/ui/api.js";
import { Bars, modelOf, ms, Note, PhaseLegend } from "/ui/parts.js";

const SHOWN = 200;
const FILTERS = ["key", "adapter", "worker", "status"];

export const Requests = ({ live }) => {
  const [asked, setAsked] = useState({});
  const [rows, setRows] = useState([]);
  const [error, setError] = useState("");
  const [opened, open] = useState(null);
  const query = FILTERS.filter((f) => asked[f]).map((f) => `&${f}=${encodeURIComponent(asked[f])}`).join("");
  useEffect(() => {
    let going = true;
    get(`/admin/requests?limit=${SHOWN}${query}`).then((found) => { if (going) { setRows(found.requests); setError(""); } }, (exc) => going && setError(exc.message));
    return () => { going = false; };
  }, [query, live.requests_seen]);
  const longest = Math.max(1, ...rows.map((r) => r.total_ms));
  return html`<h2>Requests</h2>
  <div class="tools">${FILTERS.map((f) => html`<label>${f} <input name=${f} value=${asked[f] ?? ""} onInput=${(e) => setAsked({ ...asked, [f]: e.target.value.trim() })} /></label>`)}</div>
  <${PhaseLegend} /><${Note} text=${error} bad />
  ${opened ? html`<${Story} key=${opened} id=${opened} close=${() => open(null)} />` : null}
  <div class="scroll"><table id="requests"><caption class="hide">The last requests, newest first</caption>
    <thead><tr><th>Time</th><th>Request</th><th>Model</th><th>Worker</th><th>Outcome</th><th>Tier</th><th class="n">First token</th><th class="n">Total</th><th class="wide">Phases</th></tr></thead>
    <tbody>${rows.map((r) => html`<tr key=${r.id + r.at} data-request=${r.id}><td>${r.at.slice(11, 23)}</td>
      <th scope="row"><button class="link" onClick=${() => open(r.id)}>${r.id.slice(0, 20)}</button></th>
      <td>${modelOf(r)}</td><td>${r.worker ?? "–"}</td><td><span class=${`state ${r.outcome}`}>${r.code ?? r.outcome}</span></td><td>${r.tier ?? "–"}</td>
      <td class="n">${ms(r.ttft_ms)}</td><td class="n">${ms(r.total_ms)}</td><td><${Bars} phases=${r.phases_ms} longest=${longest} /></td></tr>`)}</tbody></table></div>
  ${rows.length ? null : html`<p>No request has ended that is so.</p>`}`;
};

const Story = ({ id, close }) => {
  const [told, setTold] = useState(null);
  const [error, setError] = useState("");
  useEffect(() => { get(`/admin/requests/${encodeURIComponent(id)}`).then(setTold, (exc) => setError(exc.message)); }, []);
  const candidates = told?.decision.candidates ?? [];
  const terms = candidates.length ? Object.keys(candidates[0].terms_ms) : [];
  return html`<section class="panel" id="story" aria-label=${`Request ${id}`}>
    <header><h3>${id}</h3><button onClick=${close} aria-label="Close">✕</button></header><${Note} text=${error} bad />
    ${told ? html`${told.words.map((w) => html`<p>${w}</p>`)}
      <${Bars} phases=${told.phases_ms} longest=${told.total_ms} />
      ${told.faster.length ? html`<h4>What would have made it faster</h4><ul>${told.faster.map((f) => html`<li>${f}</li>`)}</ul>` : null}
      <h4>Decision</h4><p>Its cost was put at ${ms(told.decision.expected_ms)}; from its dispatch to its first token it took ${ms(told.decision.happened_ms)}.</p>
      ${candidates.length ? html`<div class="scroll"><table><thead><tr><th>Worker</th><th>Tier</th><th class="n">Cost, ms</th>${terms.map((t) => html`<th class="n">${t}</th>`)}<th>Note</th></tr></thead>
        <tbody>${candidates.map((c) => html`<tr class=${c.worker === told.worker ? "chosen" : ""}><th scope="row">${c.worker}${c.worker === told.worker ? " ✓" : ""}</th><td>${c.tier}</td><td class="n">${c.cost_ms}</td>
          ${terms.map((t) => html`<td class="n">${c.terms_ms[t]}</td>`)}<td>${c.note}</td></tr>`)}</tbody></table></div>`
        : html`<p class="dim">The candidates of this choice were not kept: at most ten a second are.</p>`}` : null}</section>`;
};

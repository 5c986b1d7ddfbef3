import { html } from "/ui/vendor/htm-preact.js";
import { count, Meter, ms } from "/ui/parts.js";

const Model = ({ name, m }) => html`<article class="card">
  <h3>${name}</h3>
  <p class="big">${m.present}${m.wanted === undefined ? html` <small>${m.present === 1 ? "worker" : "workers"}</small>` : html` <small>of ${m.wanted} wanted</small>`}</p>
  <p>${m.queued} queued${m.starting ? `, ${m.starting} starting` : ""}${m.draining ? `, ${m.draining} draining` : ""}</p>
  ${m.reason ? html`<p class="dim">${m.reason}</p>` : null}</article>`;

export const Fleet = ({ live }) => {
  const { workers, scaling, restarts, moved } = live;
  return html`<h2>Fleet</h2>
  <div class="cards">
    ${Object.entries(scaling.models).map(([name, m]) => html`<${Model} name=${name} m=${m} />`)}
    <article class="card"><h3>This gateway</h3><p class="big">${live.open_requests} <small>open</small></p>
      <p>policy ${live.policy}</p><p class="dim">${count(moved)} streams moved, seen while this page is open</p></article>
  </div>
  ${scaling.supervisor ? null : html`<p class="dim">The workers are started by somebody else: nothing here scales them.</p>`}
  <div class="scroll"><table id="workers"><caption class="hide">Workers</caption>
    <thead><tr><th>Worker</th><th>Model</th><th>State</th><th>Load</th><th>Slots</th><th>KV cache</th>
      <th class="n">On worker</th><th class="n">Step</th><th class="n">Load (stall)</th><th class="n">Prefill</th><th class="n">Restarts</th></tr></thead>
    <tbody>${workers.map((w) => html`<tr key=${w.id} data-worker=${w.id}>
      <th scope="row">${w.id}<small class="dim" title=${w.host}>${w.host.slice(0, 10)}</small></th><td>${w.base}</td>
      <td><span class=${`state ${w.state}`}>${w.state}</span>${w.reason ? html`<small class="dim">${w.reason}</small>` : null}</td>
      <td><${Meter} value=${w.load} of=${w.capacity} label=${`${w.load} / ${w.capacity}`} /></td>
      <td><${Meter} value=${w.slots_busy} of=${w.slots} label=${`${w.slots_busy} busy, ${w.slots_loaded} full / ${w.slots}`} /></td>
      <td><${Meter} value=${w.kv_usage} of=${1} label=${`${Math.round(w.kv_usage * 100)} %`} /></td>
      <td class="n">${w.running} run, ${w.waiting} wait</td>
      <td class="n">${ms(w.step_ms || null)}</td><td class="n">${ms(w.load_ms || null)} (${ms(w.stall_ms || null)})</td>
      <td class="n">${w.prefill_tokens_per_s ? `${count(w.prefill_tokens_per_s)}/s` : "–"}</td>
      <td class="n">${restarts[w.id] ?? 0}</td></tr>`)}</tbody></table></div>
  ${workers.length ? null : html`<p>No worker has come yet.</p>`}`;
};

import { html } from "/ui/vendor/htm-preact.js";
import { count, Meter, ms, plural } from "/ui/parts.js";

const Model = ({ name, m }) =>
  html`<article class="card">
    <h3>${name}</h3>
    <p class="big">
      ${m.present}${" "}
      <small
        >${
          m.wanted === undefined
            ? m.present === 1
              ? "worker"
              : "workers"
            : `of ${plural(m.wanted, "worker")} wanted`
        }</small
      >
    </p>
    <p>
      ${m.queued}${" "}
      queued${m.starting ? `, ${m.starting} starting` : ""}${
        m.draining ? `, ${m.draining} draining` : ""
      }
    </p>
    ${m.reason ? html`<p class="dim">${m.reason}</p>` : null}
  </article>`;

export const Fleet = ({ live }) => {
  const { workers, scaling } = live;
  const moved = workers.reduce((sum, w) => sum + w.moved, 0);
  return html`<h2>Fleet</h2>
    <div class="cards">
      ${Object.entries(scaling.models).map(([name, m]) => html`<${Model} name=${name} m=${m} />`)}
      <article class="card">
        <h3>This gateway</h3>
        <p class="big">
          ${count(live.open_requests)}${" "}
          <small>${live.open_requests === 1 ? "open request" : "open requests"}</small>
        </p>
        <p>policy ${live.policy}</p>
        <p class="dim">${plural(moved, "stream")} moved away from these workers</p>
      </article>
    </div>
    ${
      scaling.supervisor
        ? null
        : html`<p class="dim aside">
            The workers are started by somebody else: nothing here scales them.
          </p>`
    }
    <div class="scroll">
      <table id="workers">
        <caption class="hide">
          Workers
        </caption>
        <thead>
          <tr>
            <th>Worker</th>
            <th>Model</th>
            <th>State</th>
            <th>Requests</th>
            <th>Slots</th>
            <th>KV cache</th>
            <th class="n">In engine</th>
            <th class="n">Step</th>
            <th class="n" title="A whole load of an adapter, and the part that stops the engine">
              Adapter load
            </th>
            <th class="n" title="Tokens a second">Prefill</th>
            <th class="n" title="Streams that others went on with">Moved</th>
            <th class="n">Restarts</th>
          </tr>
        </thead>
        <tbody>
          ${workers.map(
            (w) =>
              html`<tr key=${w.id} data-worker=${w.id}>
                <th scope="row">
                  ${w.id}<small class="dim" title=${w.host}>${w.host.slice(0, 10)}</small>
                </th>
                <td>${w.base}</td>
                <td>
                  <span class=${`state ${w.state}`}>${w.state}</span
                  >${w.reason ? html`<small class="dim">${w.reason}</small>` : null}
                </td>
                <td>
                  <${Meter} value=${w.load} of=${w.capacity} label=${`${w.load} / ${w.capacity}`} />
                </td>
                <td>
                  <${Meter}
                    value=${w.slots_busy}
                    of=${w.slots}
                    label=${`${w.slots_busy} / ${w.slots} busy`}
                    said=${`${w.slots_busy} of ${w.slots} slots busy, ${w.slots_loaded} full`}
                  /><small class="dim">${w.slots_loaded} full</small>
                </td>
                <td>
                  <${Meter}
                    value=${w.kv_usage}
                    of=${1}
                    label=${`${Math.round(w.kv_usage * 100)} %`}
                  />
                </td>
                <td class="n">${w.running} run<small class="dim">${w.waiting} wait</small></td>
                <td class="n">${ms(w.step_ms || null)}</td>
                <td class="n">
                  ${ms(w.load_ms || null)}<small class="dim">stall ${ms(w.stall_ms || null)}</small>
                </td>
                <td class="n">
                  ${w.prefill_tokens_per_s ? `${count(w.prefill_tokens_per_s)}/s` : "–"}
                </td>
                <td class="n">${count(w.moved)}</td>
                <td class="n">${count(w.restarts)}</td>
              </tr>`,
          )}
        </tbody>
      </table>
    </div>
    ${
      workers.length
        ? null
        : Object.values(scaling.models).every((m) => m.wanted === 0)
          ? html`<p class="empty">No worker is wanted now. The next request starts one.</p>`
          : html`<p class="empty">
            No worker is here. Start one with <code>loraplex worker</code>, or let${" "}
            <code>loraplex serve</code> start them.
          </p>`
    }`;
};

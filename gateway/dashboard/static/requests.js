import { html, useEffect, useState } from "/ui/vendor/htm-preact.js";
import { get } from "/ui/api.js";
import { Bars, clock, modelOf, ms, Note, Panel, PhaseLegend } from "/ui/parts.js";

const SHOWN = 200;
const FILTERS = ["key", "adapter", "worker", "status"];
const OUTCOMES = ["finished", "failed", "aborted", "refused", "limited", "invalid"];
const WORDS = {
  key: (r) => [r.key],
  adapter: (r) => [r.adapter, `${r.base}:${r.adapter}`],
  worker: (r) => [r.worker],
  status: (r) => [r.outcome, r.code, r.engine_status && String(r.engine_status)],
};
const matches = (r, asked) => FILTERS.every((f) => !asked[f] || WORDS[f](r).includes(asked[f]));

export const Requests = ({ live }) => {
  const [asked, setAsked] = useState({});
  const [found, setFound] = useState({ query: null, rows: [] });
  const [error, setError] = useState("");
  const [opened, open] = useState(null);
  const query = FILTERS.filter((f) => asked[f])
    .map((f) => `&${f}=${encodeURIComponent(asked[f])}`)
    .join("");
  useEffect(() => {
    let going = true;
    get(`/admin/requests?limit=${SHOWN}${query}`).then(
      (answer) => {
        if (going) {
          setFound({ query, rows: answer.requests });
          setError("");
        }
      },
      (exc) => going && setError(exc.message),
    );
    return () => {
      going = false;
    };
  }, [query]);
  // what the gateway remembered when it was asked, and what has come by the stream since
  const before = found.query === query ? found.rows : [];
  const known = new Set(before.map((r) => r.id + r.at));
  const rows = [
    ...live.recent.filter((r) => matches(r, asked) && !known.has(r.id + r.at)),
    ...before,
  ].slice(0, SHOWN);
  const longest = Math.max(1, ...rows.map((r) => r.total_ms));
  return html`<h2>Requests</h2>
    <div class="tools">
      ${FILTERS.map(
        (f) =>
          html`<label
            >${f[0].toUpperCase() + f.slice(1)}${" "}
            <input
              name=${f}
              value=${asked[f] ?? ""}
              list=${f === "status" ? "outcomes" : undefined}
              onInput=${(e) => setAsked({ ...asked, [f]: e.target.value.trim() })}
          /></label>`,
      )}
      <datalist id="outcomes">${OUTCOMES.map((o) => html`<option value=${o}></option>`)}</datalist>
    </div>
    <${PhaseLegend} /><${Note} text=${error} bad />
    ${opened ? html`<${Story} key=${opened} id=${opened} close=${() => open(null)} />` : null}
    <div class="scroll">
      <table id="requests">
        <caption class="hide">
          The last requests, newest first
        </caption>
        <thead>
          <tr>
            <th>Time</th>
            <th>Request</th>
            <th>Model</th>
            <th>Worker</th>
            <th>Outcome</th>
            <th>Tier</th>
            <th class="n">First token</th>
            <th class="n">Total</th>
            <th class="wide">Phases</th>
          </tr>
        </thead>
        <tbody>
          ${rows.map(
            (r) =>
              html`<tr
                key=${r.id + r.at}
                data-request=${r.id}
                class=${r.id === opened ? "chosen" : ""}
              >
                <td>${clock(r.at)}</td>
                <th scope="row">
                  <button class="link" title=${r.id} onClick=${() => open(r.id)}>
                    ${r.id.length > 16 ? `${r.id.slice(0, 6)}…${r.id.slice(-8)}` : r.id}
                  </button>
                </th>
                <td class="model" title=${modelOf(r)}>${modelOf(r)}</td>
                <td>${r.worker ?? "–"}</td>
                <td>
                  <span class=${`state ${r.engine_status ? "refused" : r.outcome}`}
                    >${r.code ?? (r.engine_status ? `engine: ${r.engine_status}` : r.outcome)}</span
                  >${r.moves ? html` <span class="state moved-mark">moved</span>` : null}
                </td>
                <td>${r.adapter === null ? "–" : (r.tier ?? "–")}</td>
                <td class="n">${ms(r.ttft_ms)}</td>
                <td class="n">${ms(r.total_ms)}</td>
                <td><${Bars} phases=${r.phases_ms} longest=${longest} /></td>
              </tr>`,
          )}
        </tbody>
      </table>
    </div>
    ${
      rows.length
        ? null
        : html`<p class="empty">
            ${query ? "No request that is remembered is so." : "No request has ended yet."}
          </p>`
    }`;
};

const Story = ({ id, close }) => {
  const [timeline, setTimeline] = useState(null);
  const [error, setError] = useState("");
  useEffect(() => {
    get(`/admin/requests/${encodeURIComponent(id)}`).then(setTimeline, (exc) =>
      setError(exc.message),
    );
  }, []);
  return html`<${Panel} id="timeline" title=${`Request ${id}`} close=${close}
    ><${Note} text=${error} bad />${
      timeline
        ? html`${timeline.words.map((w) => html`<p>${w}</p>`)}
            <${Bars} phases=${timeline.phases_ms} longest=${timeline.total_ms} />
            ${
              timeline.faster.length
                ? html`<h4>What would have made it faster</h4>
                    <ul>
                      ${timeline.faster.map((f) => html`<li>${f}</li>`)}
                    </ul>`
                : null
            }
            <${Decision} timeline=${timeline} />`
        : error
          ? null
          : html`<p class="dim">Looking …</p>`
    }<//
  >`;
};

const Decision = ({ timeline }) => {
  const {
    candidates,
    chosen_terms_ms: terms,
    expected_ms: expected,
    happened_ms: happened,
  } = timeline.decision;
  const { worker, tier } = timeline;
  if (!worker) return null;
  const shown = candidates.length
    ? candidates
    : terms
      ? [{ worker, tier, cost_ms: expected, terms_ms: terms, note: "" }]
      : [];
  const names = shown.length ? Object.keys(shown[0].terms_ms) : [];
  return html`<h4>Decision</h4>
    <p>
      Its cost was put at
      ${happened === null ? null : ` ${ms(expected)}; from its dispatch to its first token it took`}
      ${` ${ms(happened ?? expected)}.`}
    </p>
    ${
      shown.length
        ? html`<div class="scroll">
            <table>
              <thead>
                <tr>
                  <th>Worker</th>
                  <th>Tier</th>
                  <th class="n">Cost, ms</th>
                  ${names.map((t) => html`<th class="n">${t}</th>`)}
                  <th>Note</th>
                </tr>
              </thead>
              <tbody>
                ${shown.map(
                  (c) =>
                    html`<tr class=${c.worker === worker ? "chosen" : ""}>
                      <th scope="row">${c.worker}${c.worker === worker ? " ✓" : ""}</th>
                      <td>${c.tier ?? "–"}</td>
                      <td class="n">${c.cost_ms}</td>
                      ${names.map((t) => html`<td class="n">${c.terms_ms[t]}</td>`)}
                      <td>${c.note}</td>
                    </tr>`,
                )}
              </tbody>
            </table>
          </div>`
        : null
    }
    ${
      candidates.length
        ? null
        : html`<p class="dim">
            Only the chosen worker is shown: all candidates of ten choices a second are kept.
          </p>`
    }`;
};

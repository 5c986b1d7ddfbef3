// Small pieces that several views use.
import { html } from "/ui/vendor/htm-preact.js";

export const PHASES = ["queue", "lost", "moved", "wait", "load", "prefill", "decode"];
export const modelOf = (r) => (r.adapter === null ? r.base : `${r.base}:${r.adapter}`);
export const ms = (n) => (n === null || n === undefined ? "–" : n >= 10000 ? `${(n / 1000).toFixed(1)} s` : `${n >= 100 ? Math.round(n) : Number(n.toFixed(1))} ms`);
export const count = (n) => (n === null || n === undefined ? "–" : n.toLocaleString("en"));

export const Meter = ({ of, value, label }) => {
  const share = of ? Math.min(1, value / of) : 0;
  return html`<span class="meter" role="img" aria-label=${`${label}: ${value} of ${of}`}>
    <span class=${share > 0.9 ? "fill high" : "fill"} style=${{ width: `${share * 100}%` }}></span>
    <span class="over">${label}</span></span>`;
};

export const Bars = ({ phases, longest }) => {
  const total = PHASES.reduce((sum, name) => sum + phases[name], 0);
  const said = PHASES.filter((p) => phases[p] > 0).map((p) => `${p} ${ms(phases[p])}`).join(", ");
  return html`<span class="bars" role="img" aria-label=${said} title=${said}>
    <span class="run" style=${{ width: `${Math.max(1, (100 * total) / (longest || 1))}%` }}>
    ${PHASES.filter((p) => phases[p] > 0).map((p) => html`<span class=${`phase ${p}`} style=${{ flexGrow: phases[p] }}></span>`)}
    </span></span>`;
};

export const PhaseLegend = () => html`<ul class="legend" aria-label="Phases">
  ${PHASES.map((p) => html`<li><span class=${`phase swatch ${p}`}></span>${p}</li>`)}</ul>`;

export const Note = ({ text, bad }) => text ? html`<p class=${bad ? "note bad" : "note"} role=${bad ? "alert" : "status"}>${text}</p>` : null;

// Small pieces that several views use.
import { html, useEffect, useRef } from "/ui/vendor/htm-preact.js";

export const PHASES = [
  "queue",
  "lost",
  "moved",
  "wait",
  "fetch",
  "check",
  "load",
  "prefill",
  "decode",
];
export const modelOf = (r) => (r.adapter === null ? r.base || "–" : `${r.base}:${r.adapter}`);
export const ms = (n) =>
  n === null || n === undefined
    ? "–"
    : n >= 10000
      ? `${(n / 1000).toFixed(1)} s`
      : `${n >= 100 ? Math.round(n) : Number(n.toFixed(1))} ms`;
export const count = (n) => (n === null || n === undefined ? "–" : n.toLocaleString("en"));
export const bytes = (n) =>
  n === null || n === undefined
    ? "–"
    : n < 1e6
      ? `${Math.max(1, Math.round(n / 1e3))} KB`
      : n < 1e9
        ? `${(n / 1e6).toFixed(1)} MB`
        : `${(n / 1e9).toFixed(1)} GB`;
export const clock = (when) => new Date(when).toLocaleTimeString("en-GB", { hour12: false });
export const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

/** Calls `look` now and then every `everyMs`, but not while nobody can see the page. */
export function useEvery(everyMs, look, causes) {
  useEffect(() => {
    let going = true,
      timer = 0;
    const isCurrent = () => going;
    const again = () => {
      clearTimeout(timer);
      if (going && !document.hidden)
        look(isCurrent).finally(() => {
          clearTimeout(timer);
          if (going) timer = setTimeout(again, everyMs);
        });
    };
    document.addEventListener("visibilitychange", again);
    again();
    return () => {
      going = false;
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", again);
    };
  }, causes);
}

/**
 * A part that was opened: it gets the focus, Escape closes it, and the focus goes back to what
 * opened it.
 */
export const Panel = ({ id, title, close, children }) => {
  const self = useRef(null);
  useEffect(() => {
    const opener = document.activeElement;
    self.current.focus();
    return () => {
      if (opener?.isConnected) opener.focus();
      else document.getElementById("main")?.focus();
    };
  }, []);
  const key = (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
    }
  };
  return html`<section
    class="panel"
    id=${id}
    aria-label=${title}
    tabindex="-1"
    ref=${self}
    onKeyDown=${key}
  >
    <header>
      <h3>${title}</h3>
      <button onClick=${close} aria-label=${`Close ${title}`} title="Close (Esc)">✕</button>
    </header>
    ${children}
  </section>`;
};

export const Meter = ({ of, value, label, said }) => {
  const share = of ? Math.max(0, Math.min(1, value / of)) : 0;
  return html`<span class="meter" role="img" aria-label=${said ?? label} title=${said ?? label}>
    <span class=${share > 0.9 ? "fill high" : "fill"} style=${{ width: `${share * 100}%` }}></span>
    <span class="over">${label}</span></span
  >`;
};

export const Bars = ({ phases, longest }) => {
  const total = PHASES.reduce((sum, name) => sum + phases[name], 0);
  const took = PHASES.filter((p) => phases[p] > 0);
  const said = took.map((p) => `${p} ${ms(phases[p])}`).join(", ") || ms(0);
  return html`<span class="bars" role="img" aria-label=${said} title=${said}>
    <span class="run" style=${{ width: `${Math.max(1, (100 * total) / (longest || 1))}%` }}>
      ${took.map(
        (p) => html`<span class=${`phase ${p}`} style=${{ flexGrow: phases[p] }}></span>`,
      )}
    </span></span
  >`;
};

export const PhaseLegend = () =>
  html`<ul class="legend" aria-label="Phases">
    ${PHASES.map((p) => html`<li><span class=${`phase swatch ${p}`}></span>${p}</li>`)}
  </ul>`;

export const Note = ({ text, bad }) =>
  text
    ? html`<p class=${bad ? "note bad" : "note"} role=${bad ? "alert" : "status"}>${text}</p>`
    : null;

// The last hour, drawn as plain SVG.
import { html, useState } from "/ui/vendor/htm-preact.js";
import { get } from "/ui/api.js";
import { Note, useEvery } from "/ui/parts.js";

const AGAIN_MS = 5000;
const CHARTS = [
  ["First token, warm", "ms", ["ttft_warm_p50_ms", "ttft_warm_p95_ms"]],
  ["First token, cold", "ms", ["ttft_cold_p50_ms", "ttft_cold_p95_ms"]],
  ["Between tokens", "ms", ["itl_ms"]],
  ["Tokens a second", "", ["output_tokens_per_s", "prompt_tokens_per_s"]],
  ["Requests a second", "", ["requests_per_s"]],
  ["Waiting and open requests", "", ["queued", "ongoing"]],
  ["Adapters, per 10 s", "", ["loads", "evictions"]],
  ["Trouble, per 10 s", "", ["errors", "moved"]],
];
const LEAST = 30; // values that a chart shows; a gateway that has just started has no more
const WIDTH = 360,
  HEIGHT = 110;
const short = (n) =>
  n >= 1000 ? `${(n / 1000).toFixed(1)}k` : n >= 100 ? Math.round(n) : Number(n.toFixed(1));
const NAMES = {
  ttft_warm_p50_ms: "median",
  ttft_cold_p50_ms: "median",
  ttft_warm_p95_ms: "95 of 100",
  ttft_cold_p95_ms: "95 of 100",
  itl_ms: "mean",
  output_tokens_per_s: "output",
  prompt_tokens_per_s: "prompt",
  requests_per_s: "ended",
  ongoing: "open",
};
const nameOf = (column) => NAMES[column] ?? column;

/** Runs of neighbours that have values; a lone one becomes a dot. */
function runs(values, most) {
  const found = [];
  values.forEach((v, at) => {
    if (v === null) return;
    const point = [(at * WIDTH) / (values.length - 1), HEIGHT - (v / most) * HEIGHT];
    if (at && values[at - 1] !== null) found.at(-1).push(point);
    else found.push([point]);
  });
  return found;
}

/**
 * Without the last step, which is not over: its counts would be too low. And without the empty time
 * before the first value of any series.
 */
function trimmed(series) {
  const all = Object.values(series),
    length = all[0].length - 1;
  const first = Math.min(
    ...all.map((values) => values.findIndex((v) => v !== null)).map((at) => (at < 0 ? length : at)),
  );
  const from = Math.max(0, Math.min(first, length - LEAST));
  return Object.fromEntries(
    Object.entries(series).map(([name, values]) => [name, values.slice(from, length)]),
  );
}

const Chart = ({ title, unit, columns, series, stepS }) => {
  const [at, setAt] = useState(null);
  const length = series[columns[0]].length;
  const most = Math.max(1e-9, ...columns.flatMap((c) => series[c].map((v) => v ?? 0))) * 1.05;
  const hover = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    setAt(
      Math.min(
        length - 1,
        Math.max(0, Math.round(((event.clientX - box.left) / box.width) * (length - 1))),
      ),
    );
  };
  const last = (c) => series[c].findLast((v) => v !== null) ?? null;
  const value = (c) => {
    const v = at === null ? last(c) : series[c][at];
    return v === null ? "–" : `${short(v)} ${unit}`;
  };
  const x = (at * WIDTH) / (length - 1);
  const when = at === null ? "latest" : `${Math.round(((length - 1 - at) * stepS) / 60)} min ago`;
  return html`<figure class="card" data-chart=${columns[0]}>
    <figcaption>
      <strong>${title}</strong> <small class="dim">${when}</small>
      <ul class="legend">
        ${columns.map(
          (c, n) =>
            html`<li><span class=${`swatch s${n}`}></span>${nameOf(c)} <b>${value(c)}</b></li>`,
        )}
      </ul>
    </figcaption>
    <svg
      viewBox=${`-2 -4 ${WIDTH + 4} ${HEIGHT + 8}`}
      preserveAspectRatio="none"
      role="img"
      aria-label=${`${title}: ${columns.map((c) => `${nameOf(c)} ${value(c)}`).join(", ")}`}
      onPointerMove=${hover}
      onPointerLeave=${() => setAt(null)}
    >
      ${[0, 0.5, 1].map(
        (y) => html`<line class="grid" x1="0" x2=${WIDTH} y1=${HEIGHT * y} y2=${HEIGHT * y} />`,
      )}
      ${columns.map((c, n) =>
        runs(series[c], most).map((run) =>
          run.length > 1
            ? html`<polyline
                class=${`line s${n}`}
                points=${run.map((p) => p.map((x) => x.toFixed(1)).join(",")).join(" ")}
              />`
            : html`<circle class=${`dot s${n}`} cx=${run[0][0]} cy=${run[0][1]} r="2" />`,
        ),
      )}
      ${at === null ? null : html`<line class="cursor" x1=${x} x2=${x} y1="0" y2=${HEIGHT} />`}
    </svg>
    <div class="axis dim">
      <span>${Math.round((length * stepS) / 60)} min ago</span
      ><span>scale 0 to ${short(most)} ${unit}</span><span>now</span>
    </div>
  </figure>`;
};

/** Which gateway processes the figures are of. */
function whose(processes) {
  const names = Object.keys(processes);
  const silent = names.filter((name) => !processes[name]);
  if (silent.length) return `Without ${silent.join(", ")}, which did not answer.`;
  return names.length === 1
    ? `Of the gateway process ${names[0]}.`
    : "Of all processes of this gateway.";
}

export const Time = () => {
  const [hour, setHour] = useState(null);
  const [error, setError] = useState("");
  useEvery(
    AGAIN_MS,
    (isCurrent) =>
      get("/admin/series").then(
        (found) => {
          if (isCurrent()) {
            setHour(found);
            setError("");
          }
        },
        (exc) => isCurrent() && setError(exc.message),
      ),
    [],
  );
  const series = hour && trimmed(hour.series);
  return html`<h2>Time</h2>
    <${Note} text=${error} bad />${
      hour
        ? html`<div class="charts">
              ${CHARTS.map(
                ([title, unit, columns]) =>
                  html`<${Chart}
                    title=${title}
                    unit=${unit}
                    columns=${columns}
                    series=${series}
                    stepS=${hour.step_s}
                  />`,
              )}
            </div>
            ${
              Object.keys(hour.errors).length
                ? html`<h3>Errors of the last hour</h3>
                    <ul id="errors">
                      ${Object.entries(hour.errors).map(
                        ([code, n]) => html`<li><code>${code}</code> ${n}</li>`,
                      )}
                    </ul>`
                : null
            }
            <p class="dim">${whose(hour.processes)}</p>`
        : null
    }`;
};

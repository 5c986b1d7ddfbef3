import { html, useState } from "/ui/vendor/htm-preact.js";
import { get } from "/ui/api.js";
import { count, Meter, Note, useEvery } from "/ui/parts.js";

const AGAIN_MS = 2000;
const USAGE_AGAIN_MS = 60000; // a day of a busy gateway takes its ledger seconds to sum
const SHOWN = 200;
const RATES = {
  requests_per_minute: "requests/min",
  tokens_per_minute: "tokens/min",
  adapters_per_minute: "adapters/min",
  concurrent_requests: "open requests",
};
const utcMinute = (s) => `${new Date(s * 1000).toISOString().slice(0, 16).replace("T", " ")} UTC`;
const everything = (globs) => (globs.length === 1 && globs[0] === "*" ? "all" : globs.join(", "));

const Expires = ({ at }) => {
  if (at === null) return "never";
  if (at * 1000 > Date.now()) return utcMinute(at);
  return html`<span class="bad-text">expired ${utcMinute(at)}</span>`;
};

/** What is used up of each limit, and the limits that a request meets by itself. */
const Limits = ({ limits, left }) => {
  const names = Object.keys(limits);
  if (!names.length) return html`<span class="dim">none</span>`;
  return html`<div class="limits">
    ${names.map((name) => {
      if (!(name in left))
        return html`<span>${name.replaceAll("_", " ")} ≤ ${count(limits[name])}</span>`;
      const rest = Math.max(0, Math.floor(left[name])),
        said = `${count(rest)} of ${count(limits[name])} ${RATES[name]} left`;
      return html`<${Meter} value=${limits[name] - rest} of=${limits[name]} label=${said} />`;
    })}
  </div>`;
};

/** What a path answers, asked again and again, and why it did not the last time. */
function useAnswer(everyMs, path) {
  const [answer, setAnswer] = useState(null);
  const [error, setError] = useState("");
  useEvery(
    everyMs,
    (isCurrent) =>
      get(path).then(
        (found) => {
          if (!isCurrent()) return;
          setAnswer(found);
          setError("");
        },
        (exc) => isCurrent() && setError(exc.message),
      ),
    [],
  );
  return [answer, error];
}

export const Keys = () => {
  const [known, keysError] = useAnswer(AGAIN_MS, "/admin/keys");
  const [used, usageError] = useAnswer(USAGE_AGAIN_MS, "/admin/usage?by=key,base,adapter");
  const error = keysError || usageError;
  const keys = known && known.keys;
  if (keys === null)
    return html`<h2>Keys and usage</h2>
      ${error ? html`<${Note} text=${error} bad />` : html`<p class="dim">Looking …</p>`}`;
  return html`<h2>Keys and usage</h2>
    <${Note} text=${error} bad />
    ${
      keys.length
        ? html`<div class="scroll">
            <table id="keys">
              <thead>
                <tr>
                  <th>Key</th>
                  <th>Models</th>
                  <th>Adapters</th>
                  <th class="n">Weight</th>
                  <th class="wide">Limits, now</th>
                  <th>Expires</th>
                </tr>
              </thead>
              <tbody>
                ${keys.map(
                  (k) =>
                    html`<tr key=${k.key} data-key=${k.key}>
                      <th scope="row">${k.key}</th>
                      <td class="globs">${everything(k.models)}</td>
                      <td class="globs">${everything(k.adapters)}</td>
                      <td class="n">${k.weight}</td>
                      <td><${Limits} limits=${k.limits} left=${k.left} /></td>
                      <td><${Expires} at=${k.expires} /></td>
                    </tr>`,
                )}
              </tbody>
            </table>
          </div>`
        : html`<p class="dim">This gateway asks its clients for no keys.</p>`
    }
    <${Usage} usage=${used && used.usage} />`;
};

const Usage = ({ usage }) =>
  html`<h3>Usage of the last 24 hours</h3>
    ${
      usage === null
        ? html`<p class="dim">Looking …</p>`
        : usage.length
          ? html`<div class="scroll">
                <table id="usage">
                  <thead>
                    <tr>
                      <th>Key</th>
                      <th>Model</th>
                      <th class="n">Requests</th>
                      <th class="n">Prompt tokens</th>
                      <th class="n">Output tokens</th>
                    </tr>
                  </thead>
                  <tbody>
                    ${usage.slice(0, SHOWN).map(
                      (u) =>
                        html`<tr>
                          <th scope="row">${u.key || "(no key)"}</th>
                          <td class="model">${u.adapter ? `${u.base}:${u.adapter}` : u.base}</td>
                          <td class="n">${count(u.requests)}</td>
                          <td class="n">${count(u.prompt_tokens)}</td>
                          <td class="n">${count(u.output_tokens)}</td>
                        </tr>`,
                    )}
                  </tbody>
                </table>
              </div>
              ${
                usage.length > SHOWN
                  ? html`<p class="dim">
                      The ${SHOWN} rows with the most output tokens. <code>/admin/usage</code> has
                      more.
                    </p>`
                  : null
              }`
          : html`<p class="empty">Nobody has used anything yet.</p>`
    }`;

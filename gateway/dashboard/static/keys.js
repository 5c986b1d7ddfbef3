import { html, useEffect, useState } from "/ui/vendor/htm-preact.js";
import { get } from "/ui/api.js";
import { count, Note } from "/ui/parts.js";

const everything = (globs) => (globs.length === 1 && globs[0] === "*" ? "all" : globs.join(", "));
const limitsOf = (limits) => Object.entries(limits).map(([name, n]) => `${name.replaceAll("_", " ")} ${count(n)}`).join(", ") || "none";

export const Keys = ({ live }) => {
  const [keys, setKeys] = useState([]);
  const [usage, setUsage] = useState([]);
  const [error, setError] = useState("");
  useEffect(() => {
    let going = true;
    Promise.all([get("/admin/keys"), get("/admin/usage?by=key,base,adapter")]).then(([known, used]) => {
      if (!going) return;
      setKeys(known.keys); setUsage(used.usage); setError("");
    }, (exc) => going && setError(exc.message));
    return () => { going = false; };
  }, [live.requests_seen]);
  return html`<h2>Keys and usage</h2><${Note} text=${error} bad />
    ${keys.length ? html`<div class="scroll"><table id="keys"><thead><tr><th>Key</th><th>Models</th><th>Adapters</th><th class="n">Weight</th><th>Limits</th><th>Expires</th></tr></thead>
    <tbody>${keys.map((k) => html`<tr data-key=${k.key}><th scope="row">${k.key}</th><td>${everything(k.models)}</td><td>${everything(k.adapters)}</td><td class="n">${k.weight}</td><td>${limitsOf(k.limits)}</td>
      <td>${k.expires === null ? "never" : new Date(k.expires * 1000).toISOString().slice(0, 16)}</td></tr>`)}</tbody></table></div>` : html`<p class="dim">This gateway asks its clients for no keys.</p>`}
    <h3>Usage of the last 24 hours</h3>
    <div class="scroll"><table id="usage"><thead><tr><th>Key</th><th>Model</th><th class="n">Requests</th><th class="n">Prompt tokens</th><th class="n">Output tokens</th></tr></thead>
    <tbody>${usage.map((u) => html`<tr><th scope="row">${u.key || "(no key)"}</th><td>${u.adapter ? `${u.base}:${u.adapter}` : u.base}</td>
      <td class="n">${count(u.requests)}</td><td class="n">${count(u.prompt_tokens)}</td><td class="n">${count(u.output_tokens)}</td></tr>`)}</tbody></table></div>
    ${usage.length ? null : html`<p>Nobody has used anything yet.</p>`}`;
};

// The frame of the page: which view, the key, and the one stream of events that all views share.
import { html, render, useEffect, useState } from "/ui/vendor/htm-preact.js";
import { live as listen, setKey } from "/ui/api.js";
import { Fleet } from "/ui/fleet.js";
import { Keys } from "/ui/keys.js";
import { Note } from "/ui/parts.js";
import { Playground } from "/ui/playground.js";
import { Requests } from "/ui/requests.js";
import { Residency } from "/ui/residency.js";
import { Time } from "/ui/time.js";

const VIEWS = { fleet: ["Fleet", Fleet], residency: ["Residency", Residency], requests: ["Requests", Requests], time: ["Time", Time], playground: ["Playground", Playground], keys: ["Keys and usage", Keys] };
const AGAIN_MS = 1000;
const viewOf = () => (location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "fleet");

/** One event added to what was known. Restarts are the lives of a worker that this page has seen. */
function grown(before, event) {
  const held = { ...before?.held };
  for (const [worker, has] of Object.entries(event.held ?? {})) {
    if (has === null) delete held[worker]; else held[worker] = new Map(has.map((h) => [h[0], h]));
  }
  const epochs = { ...before?.epochs }, restarts = { ...before?.restarts };
  for (const w of event.workers) {
    if (epochs[w.id] !== undefined && epochs[w.id] !== w.epoch) restarts[w.id] = (restarts[w.id] ?? 0) + 1;
    epochs[w.id] = w.epoch;
  }
  const moved = (before?.moved ?? 0) + event.requests.reduce((sum, r) => sum + r.moves, 0);
  return { ...event, held, epochs, restarts, moved, requests_seen: (before?.requests_seen ?? 0) + event.requests.length };
}

const KeyForm = ({ said, use }) => {
  const [typed, setTyped] = useState("");
  return html`<form class="card key" onSubmit=${(e) => { e.preventDefault(); use(typed); }}>
    <h2>Admin key</h2><p>It stays in this page's memory and is gone when the page is closed.</p>
    <label>Key <input id="key" type="password" autocomplete="off" value=${typed} onInput=${(e) => setTyped(e.target.value)} /></label>
    <button class="primary">Open</button><${Note} text=${said} bad /></form>`;
};

const App = () => {
  const [view, setView] = useState(viewOf());
  const [live, setLive] = useState(null);
  const [state, setState] = useState({ asks: false, said: "", lost: "" });
  const [tries, setTries] = useState(0);
  useEffect(() => {
    const moved = () => setView(viewOf());
    addEventListener("hashchange", moved);
    return () => removeEventListener("hashchange", moved);
  }, []);
  const withAdapters = view === "residency";
  useEffect(() => {
    const stop = new AbortController();
    let timer = 0;
    const again = (lost) => { setState((s) => ({ ...s, lost })); timer = setTimeout(() => setTries((n) => n + 1), AGAIN_MS); };
    // a new stream tells all workers' adapters anew
    setLive((before) => before && { ...before, held: {} });
    listen(withAdapters, stop.signal, (event) => { setState({ asks: false, said: "", lost: "" }); setLive((before) => grown(before, event)); })
      .then(() => again("The gateway has ended the connection."), (exc) => {
        if (stop.signal.aborted) return;
        if (exc.status === 401) setState({ asks: true, said: tries ? exc.message : "", lost: "" });
        else again(exc.status ? exc.message : "The gateway cannot be reached.");
      });
    return () => { stop.abort(); clearTimeout(timer); };
  }, [withAdapters, tries]);
  const use = (typed) => { setKey(typed); setTries((n) => n + 1); };
  const View = VIEWS[view][1];
  return html`<a class="skip" href="#main" onClick=${(e) => { e.preventDefault(); document.getElementById("main").focus(); }}>To the content</a>
    <header class="bar"><h1>Loraplex</h1><nav aria-label="Views">${Object.entries(VIEWS).map(([name, [title]]) =>
      html`<a href=${`#${name}`} aria-current=${name === view ? "page" : undefined}>${title}</a>`)}</nav>
      <span class=${state.lost ? "beat lost" : "beat"} role="status">${state.lost || (live ? new Date(live.at * 1000).toLocaleTimeString() : "")}</span></header>
    <main id="main" tabindex="-1">${state.asks ? html`<${KeyForm} said=${state.said} use=${use} />` : live ? html`<${View} live=${live} />` : html`<p>Connecting …</p>`}</main>`;
};

document.getElementById("app").textContent = "";
render(html`<${App} />`, document.getElementById("app"));

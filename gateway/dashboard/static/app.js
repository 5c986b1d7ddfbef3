// The frame of the page: which view, the key, and the one stream of events that all views share.
import { html, render, useEffect, useState } from "/ui/vendor/htm-preact.js";
import { live as listen, setKey } from "/ui/api.js";
import { Fleet } from "/ui/fleet.js";
import { Keys } from "/ui/keys.js";
import { clock, Note } from "/ui/parts.js";
import { Playground } from "/ui/playground.js";
import { Requests } from "/ui/requests.js";
import { Residency } from "/ui/residency.js";
import { Time } from "/ui/time.js";

const VIEWS = {
  fleet: ["Fleet", Fleet],
  residency: ["Residency", Residency],
  requests: ["Requests", Requests],
  time: ["Time", Time],
  playground: ["Playground", Playground],
  keys: ["Keys and usage", Keys],
};
const AGAIN_MS = 1000;
const KEPT = 500; // requests that came by the stream
const viewOf = () => (location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "fleet");

/** One event added to what was known. No request of it is lost, whenever a view is drawn. */
function grown(before, event) {
  const held = event.held_is_whole ? {} : { ...before?.held };
  for (const [worker, has] of Object.entries(event.held ?? {})) {
    if (has === null) delete held[worker];
    else held[worker] = new Map(has.map((h) => [h[0], h]));
  }
  const known = new Set(before?.recent.map((r) => r.id + r.at));
  const recent = [
    ...event.requests.filter((r) => !known.has(r.id + r.at)),
    ...(before?.recent ?? []),
  ].slice(0, KEPT);
  return { ...event, held, recent };
}

const KeyForm = ({ said, use }) => {
  const [typed, setTyped] = useState("");
  return html`<form
    class="card key"
    onSubmit=${(e) => {
      e.preventDefault();
      use(typed);
    }}
  >
    <h2>Admin key</h2>
    <p>It stays in this page's memory and is gone when the page is closed.</p>
    <label
      >Key${" "}
      <input
        id="key"
        type="password"
        autocomplete="off"
        value=${typed}
        onInput=${(e) => setTyped(e.target.value)}
    /></label>
    <button class="primary">Open</button><${Note} text=${said} bad />
  </form>`;
};

const App = () => {
  const [view, setView] = useState(viewOf());
  const [live, setLive] = useState(null);
  const [state, setState] = useState({ asks: false, said: "", lost: "" });
  const [tries, setTries] = useState(0);
  const [hidden, setHidden] = useState(document.hidden);
  useEffect(() => {
    const changed = () => setHidden(document.hidden);
    document.addEventListener("visibilitychange", changed);
    changed();
    return () => document.removeEventListener("visibilitychange", changed);
  }, []);
  useEffect(() => {
    const moved = () => setView(viewOf());
    addEventListener("hashchange", moved);
    moved(); // somebody may have clicked between the first picture and this line
    return () => removeEventListener("hashchange", moved);
  }, []);
  const withAdapters = view === "residency";
  useEffect(() => {
    document.title = `${VIEWS[view][0]} · Loraplex`;
  }, [view]);
  useEffect(() => {
    if (hidden) return undefined; // nobody looks: the gateway has nothing to do
    const stop = new AbortController();
    let timer = 0;
    let heard = false;
    const again = (lost, waitMs = AGAIN_MS) => {
      if (stop.signal.aborted) return;
      setState((s) => ({ ...s, lost }));
      // at once if it had spoken: the key may be revoked, and then nothing stays in sight
      timer = setTimeout(() => setTries((n) => n + 1), heard ? 0 : waitMs);
    };
    listen(withAdapters, stop.signal, (event) => {
      heard = true;
      setState({ asks: false, said: "", lost: "" });
      setLive((before) => grown(before, event));
    }).then(
      () => again("The gateway has ended the connection. Trying again …"),
      (exc) => {
        if (stop.signal.aborted) return;
        if (exc.status === 401 || exc.status === 403) {
          setLive(null);
          setState({ asks: true, said: tries ? exc.message : "", lost: "" });
        } else if (exc.status) again(exc.message, Math.max(AGAIN_MS, 1000 * exc.retryAfterS));
        else again("The gateway cannot be reached. Trying again …");
      },
    );
    return () => {
      stop.abort();
      clearTimeout(timer);
    };
  }, [withAdapters, tries, hidden]);
  const use = (typed) => {
    setKey(typed);
    setTries((n) => n + 1);
  };
  const View = VIEWS[view][1];
  // a screen reader reads out each change of a status: the time, which changes always, is in none
  return html`<a
      class="skip"
      href="#main"
      onClick=${(e) => {
        e.preventDefault();
        document.getElementById("main").focus();
      }}
      >To the content</a
    >
    <header class="bar">
      <h1>Loraplex</h1>
      <nav aria-label="Views">
        ${Object.entries(VIEWS).map(
          ([name, [title]]) =>
            html`<a href=${`#${name}`} aria-current=${name === view ? "page" : undefined}
              >${title}</a
            >`,
        )}
      </nav>
      <span class=${state.lost ? "live-status lost" : "live-status"}>
        <span role="status">${state.lost}</span>
        ${live && !state.lost ? clock(live.at * 1000) : ""}
      </span>
    </header>
    <main id="main" tabindex="-1">
      ${
        state.asks
          ? html`<${KeyForm} said=${state.said} use=${use} />`
          : live
            ? html`<${View} live=${live} />`
            : html`<p class="dim">${state.lost || "Connecting …"}</p>`
      }
    </main>`;
};

document.getElementById("app").textContent = "";
render(html`<${App} />`, document.getElementById("app"));

import { html, useEffect, useMemo, useRef, useState } from "/ui/vendor/htm-preact.js";
import { chat, models } from "/ui/api.js";
import { ms, Note } from "/ui/parts.js";

const NEEDS_KEY = "The models are shown to holders of an API key. Type one above.";
const orFirst = (found, chosen, at) =>
  found.includes(chosen) ? chosen : (found[at] ?? found[0] ?? "");
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const bodyOf = (model, prompt, tokens) => ({
  model,
  messages: [{ role: "user", content: prompt }],
  max_tokens: tokens,
  stream: true,
  stream_options: { include_usage: true },
});
const curlOf = (body) =>
  [
    `curl -N ${location.origin}/v1/chat/completions \\`,
    `  -H "Authorization: Bearer $KEY" -H 'Content-Type: application/json' \\`,
    `  -d ${quoted(JSON.stringify(body))}`,
  ].join("\n");
const pythonOf = (body) => {
  const [url, model, prompt] = [`${location.origin}/v1`, body.model, body.messages[0].content];
  return [
    "import os",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(url)}, api_key=os.environ.get("KEY", "none"))`,
    "stream = client.chat.completions.create(",
    `    model=${JSON.stringify(model)},`,
    `    messages=[{"role": "user", "content": ${JSON.stringify(prompt)}}],`,
    `    max_tokens=${body.max_tokens},`,
    "    stream=True,",
    ")",
    "for event in stream:",
    "    if event.choices:",
    '        print(event.choices[0].delta.content or "", end="", flush=True)',
  ].join("\n");
};

const Options = ({ known }) => known.map((m) => html`<option value=${m}>${m}</option>`);

const Side = ({ side, known, model, setModel, answer, body }) => {
  // the same ones while an answer comes, token by token: there may be thousands
  const options = useMemo(() => html`<${Options} known=${known} />`, [known]);
  return html`<section class="side" id=${`side-${side}`}>
    <label
      >Model${" "}
      <select value=${model} onChange=${(e) => setModel(e.target.value)}>
        ${options}
      </select></label
    >
    <output
      class=${answer.began && !answer.error ? "answer asked" : "answer"}
      aria-live="polite"
      aria-busy=${answer.began && !answer.ended ? "true" : "false"}
      >${answer.text}</output
    >
    <${Note} text=${answer.error} bad />
    <dl class="facts">
      <dt>First token</dt>
      <dd>${ms(answer.ttft)}</dd>
      <dt>Tokens a second</dt>
      <dd>${answer.rate ? answer.rate.toFixed(1) : "–"}</dd>
      <dt>Worker</dt>
      <dd>${answer.worker ?? "–"}</dd>
      <dt>Tier</dt>
      <dd>${answer.tier ?? "–"}</dd>
    </dl>
    <details>
      <summary>curl</summary>
      <pre>${curlOf(body)}</pre>
    </details>
    <details>
      <summary>Python</summary>
      <pre>${pythonOf(body)}</pre>
    </details>
  </section>`;
};

export const Playground = () => {
  const [known, setKnown] = useState([]);
  const [chosen, choose] = useState(["", ""]);
  const [prompt, setPrompt] = useState("Say hello.");
  const [tokens, setTokens] = useState(64);
  const [apiKey, setApiKey] = useState("");
  // kept while it is typed: the page is drawn anew every second
  const [typed, setTyped] = useState("");
  const [answers, setAnswers] = useState([{}, {}]);
  const [error, setError] = useState(null);
  const running = useRef(null);
  useEffect(() => {
    let going = true; // the answer for an earlier key may come last
    models(apiKey).then(
      (found) => {
        if (going) {
          setKnown(found);
          setError(null);
          choose(([a, b]) => [orFirst(found, a, 0), orFirst(found, b, 1)]);
        }
      },
      (exc) => going && setError(exc),
    );
    return () => {
      going = false;
    };
  }, [apiKey]);
  useEffect(() => () => running.current?.abort(), []);
  const note = (side, facts) =>
    setAnswers((before) => before.map((a, n) => (n === side ? { ...a, ...facts } : a)));
  const ask = async (side, signal) => {
    const began = performance.now();
    let text = "",
      first = 0;
    try {
      await chat(
        bodyOf(chosen[side], prompt, tokens),
        apiKey,
        signal,
        (headers) =>
          note(side, {
            worker: headers.get("x-loraplex-worker"),
            tier: headers.get("x-loraplex-adapter-tier") ?? "base model",
          }),
        (piece, usage) => {
          if (piece && !first) {
            first = performance.now();
            note(side, { ttft: first - began });
          }
          text += piece;
          const rate =
            usage && first
              ? (1000 * usage.completion_tokens) / (performance.now() - first)
              : undefined;
          note(side, rate ? { text, rate } : { text });
        },
      );
    } catch (exc) {
      if (!signal.aborted) note(side, { error: exc.message });
    }
    if (!signal.aborted) note(side, { ended: true });
  };
  const start = (event) => {
    event.preventDefault();
    running.current?.abort();
    running.current = new AbortController();
    setAnswers([{ began: true }, { began: true }]);
    [0, 1].forEach((side) => ask(side, running.current.signal));
  };
  const keyIsMissing = error?.status === 401 && !apiKey;
  return html`<h2>Playground</h2>
    <form class="ask" onSubmit=${start}>
      <label class="grow"
        >Prompt${" "}
        <textarea
          id="prompt"
          rows="3"
          value=${prompt}
          onInput=${(e) => setPrompt(e.target.value)}
        ></textarea>
      </label>
      <div class="tools">
        <label
          >Tokens${" "}
          <input
            type="number"
            min="1"
            max="4096"
            value=${tokens}
            onInput=${(e) => setTokens(Number(e.target.value) || 1)}
        /></label>
        <label
          >API key, if it is another one${" "}
          <input
            type="password"
            autocomplete="off"
            value=${typed}
            onInput=${(e) => setTyped(e.target.value)}
            onChange=${(e) => setApiKey(e.target.value.trim())}
        /></label>
        <button class="primary" id="ask">Ask both</button>
      </div>
    </form>
    <${Note} text=${keyIsMissing ? NEEDS_KEY : error?.message} bad=${!keyIsMissing} />
    <div class="sides">
      ${[0, 1].map(
        (side) =>
          html`<${Side}
            side=${side}
            known=${known}
            model=${chosen[side]}
            answer=${answers[side]}
            body=${bodyOf(chosen[side], prompt, tokens)}
            setModel=${(m) => choose((before) => before.map((b, n) => (n === side ? m : b)))}
          />`,
      )}
    </div>`;
};

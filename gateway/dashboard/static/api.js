// How the page asks its gateway. The key stays in this variable: it is never stored.
let key = "";
export const setKey = (given) => {
  key = given.trim();
};

const headers = (own) => ((own ?? key) ? { Authorization: `Bearer ${own ?? key}` } : {});

export class Refused extends Error {
  constructor(status, message, retryAfterS = 0) {
    super(message);
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

async function refusal(answer) {
  let message = `The gateway answered ${answer.status}.`;
  try {
    message = (await answer.json()).error.message;
  } catch {
    /* no body of ours */
  }
  return new Refused(answer.status, message, Number(answer.headers.get("Retry-After")));
}

export async function get(path) {
  const answer = await fetch(path, { headers: headers(), cache: "no-store" });
  if (!answer.ok) throw await refusal(answer);
  return answer.json();
}

/** The answer of an action: also of one that failed on some workers. */
export async function post(path, body) {
  const answer = await fetch(path, {
    method: "POST",
    headers: { ...headers(), "Content-Type": "application/json" },
    body: body === undefined ? "" : JSON.stringify(body),
  });
  const text = await answer.text();
  let said = text;
  try {
    said = JSON.parse(text);
  } catch {
    /* vLLM's own paths answer in plain text */
  }
  return { ok: answer.status === 200, status: answer.status, said };
}

/** Calls `each` with the data of every event until the stream ends. EventSource sends no key. */
async function events(answer, each) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      for (const line of part.split("\n")) if (line.startsWith("data: ")) each(line.slice(6));
    }
  }
}

export async function live(adapters, signal, each) {
  const answer = await fetch(`/admin/live?adapters=${adapters ? 1 : 0}`, {
    headers: headers(),
    signal,
  });
  if (!answer.ok) throw await refusal(answer);
  await events(answer, (data) => each(JSON.parse(data)));
}

export async function models(apiKey) {
  const answer = await fetch("/v1/models", { headers: headers(apiKey || undefined) });
  if (!answer.ok) throw await refusal(answer);
  return (await answer.json()).data.map((m) => m.id);
}

/** Streams one chat answer. `head` gets the response's headers, `each` every piece of text. */
export async function chat(body, apiKey, signal, head, each) {
  const answer = await fetch("/v1/chat/completions", {
    method: "POST",
    signal,
    body: JSON.stringify(body),
    headers: { ...headers(apiKey || undefined), "Content-Type": "application/json" },
  });
  if (!answer.ok) throw await refusal(answer);
  head(answer.headers);
  await events(answer, (data) => {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Refused(200, event.error.message);
    each(event.choices?.[0]?.delta?.content ?? "", event.usage);
  });
}

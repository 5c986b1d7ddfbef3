// What Node's clients are asked to do. Prints a line of JSON for each call.
//   node node_calls.mjs URL MODEL PROMPT
import Anthropic from "@anthropic-ai/sdk";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import OpenAI from "openai";

const [url, model, prompt] = process.argv.slice(2);
const v1 = `${url}/v1`, apiKey = "none", most = 200;
const messages = [{ role: "user", content: prompt }];
const chat = { model, messages, temperature: 0, max_tokens: most };
const openai = new OpenAI({ baseURL: v1, apiKey });
const anthropic = new Anthropic({ baseURL: url, apiKey });
const ai = createOpenAI({ baseURL: v1, apiKey });
const compatible = createOpenAICompatible({ name: "loraplex", baseURL: v1, apiKey });
const asked = (of) => ({ model: of, prompt, temperature: 0, maxOutputTokens: most });

async function joined(events, text) {
  let found = "";
  for await (const event of events) found += text(event) ?? "";
  return found;
}

const calls = {
  "openai (Node): chat": async () =>
    (await openai.chat.completions.create(chat)).choices[0].message.content,
  "openai (Node): chat, streamed": async () =>
    joined(
      await openai.chat.completions.create({ ...chat, stream: true }),
      (event) => event.choices[0]?.delta?.content,
    ),
  "openai (Node): responses": async () =>
    (await openai.responses.create({
      model, input: prompt, temperature: 0, max_output_tokens: most,
    })).output_text,
  "@anthropic-ai/sdk: messages": async () =>
    (await anthropic.messages.create(chat)).content[0].text,
  "@anthropic-ai/sdk: messages, streamed": async () =>
    anthropic.messages.stream(chat).finalText(),
  "@ai-sdk/openai: default model": async () => (await generateText(asked(ai(model)))).text,
  "@ai-sdk/openai: default model, streamed": async () =>
    joined(streamText(asked(ai(model))).textStream, (part) => part),
  "@ai-sdk/openai: .chat()": async () => (await generateText(asked(ai.chat(model)))).text,
  "@ai-sdk/openai-compatible: chat": async () =>
    (await generateText(asked(compatible(model)))).text,
  "@ai-sdk/openai-compatible: chat, streamed": async () =>
    joined(streamText(asked(compatible(model))).textStream, (part) => part),
};

for (const [call, ask] of Object.entries(calls)) {
  try {
    console.log(JSON.stringify({ call, text: await ask() }));
  } catch (error) {
    console.log(JSON.stringify({ call, error: String(error) }));
  }
}

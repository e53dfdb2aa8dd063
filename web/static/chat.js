// Converts conversations to tokens: Gemma's turns, as in slm.core.chat. "<end_of_turn>" in a message is encoded as plain
// characters.

const START = "<start_of_turn>";
const END = "<end_of_turn>";
// A prompt leaves room for the new tokens, but for no more than 1 / LEAST_ROOM of the context.
const LEAST_ROOM = 4;

// Returns the ids of the prompt for the next answer. messages: [{role: "system" | "user" | "assistant", content}].
// stops: ids of the model's stop tokens, which messages must not form.
export function chatIds(text, messages, stops = []) {
  const besides = text.lengthy(stops);
  const [start, end] = [text.id(START), text.id(END)];
  const ids = [...text.encode("")];
  const line = text.encodeLiteral("\n");
  const model = text.encodeLiteral("model\n");
  for (const { role, content } of messages) {
    const said = content.trim();
    if (role === "assistant") ids.push(start, ...model, ...text.encodeLiteral(said, besides), end, ...line);
    else ids.push(start, ...text.encodeLiteral(`${role}\n${said}`, besides), end, ...line);
  }
  return [...ids, start, ...model];
}

// Returns the prompt for as much of a conversation as leaves room for an answer; the oldest exchanges are dropped.
export function fittingIds(text, messages, context, newTokens, stops = []) {
  const room = Math.min(newTokens, Math.floor(context / LEAST_ROOM));
  const first = messages[0]?.role === "system" ? 1 : 0;
  let kept = messages;
  let forgotten = 0;
  for (;;) {
    const ids = chatIds(text, kept, stops);
    if (ids.length + room <= context || kept.length <= first + 2) return { ids, forgotten };
    kept = [...kept.slice(0, first), ...kept.slice(first + 2)];
    forgotten += 1;
  }
}

// The token that ends a turn, and so an answer.
export function endOfTurn(text) {
  return text.id(END);
}

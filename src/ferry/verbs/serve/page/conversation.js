// What was said, as data: kept in the tab while it is open, and given out as a file.
//
// A message is {role, content} and, for answers, what is known of it: model, finish, usage, times, guided, tokens,
// warnings, error. `schema` is the schema that was asked of it.

import { make } from './elements.js';

const KEY = 'ferry.conversation';

/** Return the messages of this tab. */
export function restored() {
  try {
    return JSON.parse(sessionStorage.getItem(KEY) ?? '[]').map((message) => ({ ...message, isLive: false }));
  } catch {
    return [];
  }
}

/** Keep the messages of this tab. */
export function store(messages) {
  try {
    sessionStorage.setItem(KEY, JSON.stringify(messages));
  } catch {
    // The tab's store is full: the conversation goes on, a reload brings back an earlier state of it.
  }
}

/** Return the messages as a request sends them: what got no answer is left out, the last message is not. */
export function asRequest(messages, system) {
  const isEmpty = (message) => message?.role === 'assistant' && message.content === '';
  const said = messages.filter((message, index) => !isEmpty(message) && !isEmpty(messages[index + 1]));
  const plain = said.map(({ role, content }) => ({ role, content }));
  return system ? [{ role: 'system', content: system }, ...plain] : plain;
}

/** Save the conversation as a file. The key is not in it. */
export function exportFile(messages, settings) {
  const kept = messages.map(({ isLive, ...message }) => message);
  const text = JSON.stringify({ format: 'ferry.conversation/1', exported: new Date().toISOString(), ...settings, messages: kept }, null, 1);
  const url = URL.createObjectURL(new Blob([text], { type: 'application/json' }));
  const stamp = new Date().toISOString().slice(0, 19).replace(/[:T]/g, '-');
  make('a', { href: url, download: `conversation-${stamp}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

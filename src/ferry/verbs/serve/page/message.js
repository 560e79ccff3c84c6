// One message of the conversation as an element: its text, what is known of it, and what can be done with it.

import { copyButton, make } from './elements.js';
import { layOut } from './json.js';
import { markdown } from './markdown.js';
import { tokenView } from './tokens.js';

/** Return a new element for a message; `act(name, message, text)` is called for edit, again, schema and key. */
export function draw(message, act) {
  const article = make('article', { className: message.role });
  article.append(make('h4', { className: 'unseen' }, message.role === 'user' ? 'You' : 'Answer'), make('div', { className: 'body' }), make('div', { className: 'foot' }));
  redraw(article, message, act);
  return article;
}

/** Bring the element up to date. Cheap enough to be called for every frame of a streamed answer. */
export function redraw(article, message, act) {
  article.setAttribute('aria-busy', String(Boolean(message.isLive)));
  article.classList.toggle('live', Boolean(message.isLive));
  article.querySelector('.body').replaceChildren(...body(message, act));
  article.querySelector('.foot').replaceChildren(...(message.isLive ? [] : foot(message, act)));
}

function body(message, act) {
  if (message.role === 'user') return [make('p', { className: 'said' }, message.content)];
  const parts = [];
  if (message.tokens?.length && message.showTokens) parts.push(tokenView(message.tokens));
  else if (message.schema !== undefined && message.content) parts.push(jsonView(message.content));
  else parts.push(...markdown(message.content));
  if (message.isLive && !message.content) parts.push(make('p', { className: 'waiting' }, make('span', { className: 'unseen' }, 'Waiting for the first token')));
  if (message.error) parts.push(problem(message, act));
  return parts;
}

function jsonView(text) {
  const pieces = layOut(text).map(([kind, piece]) => (kind === 'mark' ? piece : make('span', { className: kind }, piece)));
  return make('pre', { className: 'json', tabIndex: 0 }, make('code', {}, ...pieces));
}

function problem(message, act) {
  const { error } = message;
  const box = make('div', { className: 'problem', role: 'alert' }, make('p', {}, error.message));
  const where = [];
  if (error.keyword) where.push(`keyword ${error.keyword}`);
  if (error.pointer) where.push(`at ${error.pointer}`);
  if (error.waitS) where.push(`try again in ${error.waitS} s`);
  if (error.requestId) where.push(`request ${error.requestId}`);
  if (where.length) box.append(make('p', { className: 'where' }, where.join(' · ')));
  const row = make('div', { className: 'row' }, button('Try again', () => act('again', message)));
  if (message.schema !== undefined && (error.keyword || error.code.startsWith('guided.'))) row.append(button('Show in the schema', () => act('schema', message)));
  if (error.status === 401) row.append(button('Enter a key', () => act('key', message)));
  box.append(row);
  return box;
}

function foot(message, act) {
  const actions = make('div', { className: 'acts' });
  if (message.content) actions.append(copyButton(() => message.content));
  if (message.role === 'user') {
    actions.append(button('Edit', () => act('edit', message)));
    return [actions];
  }
  if (!message.error) actions.append(button('Again', () => act('again', message)));
  const facts = make('div', { className: 'facts' });
  const verdict = badge(message);
  if (verdict) facts.append(verdict);
  for (const fact of factsOf(message)) facts.append(make('span', {}, fact));
  return message.error && !message.content ? [] : [facts, actions, ...reasons(message)];
}

function badge(message) {
  const { guided, finish } = message;
  if (!guided) return null;
  if (guided.valid) return make('span', { className: 'badge valid' }, 'valid');
  return make('span', { className: 'badge ' + (finish === 'length' ? 'cut' : 'invalid') }, finish === 'length' ? 'cut' : 'invalid');
}

function reasons(message) {
  const lines = [...(message.warnings ?? [])];
  if (message.guided && !message.guided.valid) {
    const { reason, pointer } = message.guided;
    lines.unshift(`The answer does not keep the schema${pointer ? ` at ${pointer}` : ''}: ${reason}`);
  }
  return lines.map((line) => make('p', { className: 'note' }, line));
}

function* factsOf({ usage, times, finish, guided, numChunks }) {
  const count = usage?.completion_tokens ?? numChunks;
  if (count) yield `${usage ? '' : 'about '}${count.toLocaleString('en')} token${count === 1 ? '' : 's'}`;
  const seconds = times?.lastS - times?.firstS;
  if (count > 1 && seconds > 0) yield `${((count - 1) / seconds).toPrecision(3)} tok/s`;
  if (times?.firstS) yield `first after ${times.firstS < 10 ? times.firstS.toFixed(2) : times.firstS.toFixed(0)} s`;
  if (usage?.prompt_tokens) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    yield `prompt ${usage.prompt_tokens.toLocaleString('en')}${cached ? `, ${cached.toLocaleString('en')} cached` : ''}`;
  }
  if (finish === 'length' && !guided) yield 'cut by the limit of tokens';
  if (finish === 'stopped') yield 'stopped';
}

function button(text, act) {
  const element = make('button', { type: 'button', className: 'act' }, text);
  element.addEventListener('click', act);
  return element;
}

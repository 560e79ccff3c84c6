// The chat page: sends what is typed, shows the answer as it comes, and keeps the conversation.

import { asRequest, exportFile, restored, store } from './conversation.js';
import { make, part, say } from './elements.js';
import { draw, redraw } from './message.js';
import { examine, EXAMPLE, isSchemaOn, markRefusal, openSchema, schema, schemaState, useSchema } from './schema.js';
import { models, Refused, stream, whyNotReady } from './server.js';
import { apiKey, keep, markWrong, openSettings, sampling, systemPrompt } from './settings.js';

const POLL_MS = 1000;
const NARROW = window.matchMedia('(max-width: 1000px)');
const STARTERS = [
  ['Explain what a ferry does, in two sentences.', null],
  ['Write a list of three things to see in a harbour.', null],
  ['Describe a person who works on a ship.', EXAMPLE],
];

let messages = restored();
let running = null;
let isFollowing = true;
let connecting = null;
const articles = new Map();

openSettings();
openSchema(showForm);
openPanel(!NARROW.matches);
wire();
drawAll();
showForm();
connect();

/** Ask for the models, and wait until the server is ready. Calls while one waits share it. */
function connect() {
  connecting ??= waitUntilReady().finally(() => (connecting = null));
  return connecting;
}

async function waitUntilReady() {
  try {
    for (let reason = ''; (reason = await whyNotReady(apiKey())); ) {
      showReady('is-waiting', reason);
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
    showModels(await models(apiKey()));
    showReady('is-ready', 'Ready');
    if (schemaState() === 'unchecked') examine();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    showReady('is-lost', error.status === 401 ? 'Needs an API key' : error.message);
    if (error.status === 401) askForKey();
  }
}

function showReady(state, text) {
  part('ready').className = `ready ${state}`;
  part('ready').textContent = text;
}

function showModels(found) {
  const chosen = part('model').value;
  part('model').replaceChildren(...found.map(({ id }) => make('option', { value: id }, id)));
  if (found.some(({ id }) => id === chosen)) part('model').value = chosen;
  part('model').disabled = found.length < 2;
  document.title = `${part('model').value} – Ferry`;
  const length = found[0]?.max_model_len;
  part('about').textContent = `${part('model').value}${length ? `, up to ${length.toLocaleString('en')} tokens` : ''}`;
}

/** Send the conversation as it stands, and put the answer at its end. */
async function answer() {
  let fields;
  try {
    fields = { ...sampling(), ...form() };
  } catch (error) {
    openPanel(true);
    (part('panel').querySelector('[aria-invalid="true"]') ?? part('schema')).focus();
    say(error.message);
    return false;
  }
  const message = { role: 'assistant', content: '', isLive: true, showTokens: fields.logprobs };
  if (fields.response_format) message.schema = fields.response_format.json_schema.schema;
  const body = { messages: asRequest(messages, systemPrompt()), ...fields, stream: true, stream_options: { include_usage: true } };
  messages.push(message);
  running = new AbortController();
  isFollowing = true;
  drawAll();
  showRunning();
  say('Answering');
  try {
    await untilConnected(running.signal);
    message.model = part('model').value;
    await receive(message, { ...(message.model && { model: message.model }), ...body });
    say(`Answer finished. ${message.content.slice(0, 2000)}`);
  } catch (error) {
    fail(message, error);
  } finally {
    message.isLive = false;
    running = null;
    store(messages);
    drawAll();
    showRunning();
  }
  return true;
}

/** What is sent while the model is being loaded waits for it; Stop ends the wait. */
async function untilConnected(signal) {
  const stopped = new Promise((_, reject) => signal.addEventListener('abort', () => reject(signal.reason)));
  await Promise.race([connecting, stopped]);
}

async function receive(message, body) {
  const begun = performance.now();
  const now = () => (performance.now() - begun) / 1000;
  let frame = 0;
  message.numChunks = 0;
  for await (const chunk of stream(body, apiKey(), running.signal)) {
    if (chunk.usage) message.usage = chunk.usage;
    if (chunk.warnings?.length) message.warnings = chunk.warnings.map((one) => one.message ?? String(one));
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    if (choice.delta?.content || choice.logprobs?.content?.length) {
      message.times = { firstS: message.times?.firstS ?? now(), lastS: now() };
      message.numChunks += 1;
      message.content += choice.delta?.content ?? '';
    }
    if (choice.logprobs?.content) message.tokens = [...(message.tokens ?? []), ...choice.logprobs.content.map(readToken)];
    if (choice.finish_reason) message.finish = choice.finish_reason;
    if (choice.guided) message.guided = choice.guided;
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      if (message.isLive) drawOne(message);
    });
  }
}

function readToken({ token, logprob, top_logprobs: top = [] }) {
  return { text: token, logprob, top: top.map((one) => ({ text: one.token, logprob: one.logprob })) };
}

function fail(message, error) {
  if (error.name === 'AbortError') {
    message.finish = 'stopped';
    say('Stopped');
    return;
  }
  if (!(error instanceof Refused)) throw error;
  const { status, code, param, keyword, pointer, requestId, waitS } = error;
  message.error = { message: error.message, status, code, keyword, pointer, requestId, waitS };
  message.finish = 'error';
  markWrong(param, error.message);
  if (message.schema !== undefined && (keyword || pointer)) markRefusal(error);
  if (!status || status === 503) connect();
}

function form() {
  const wanted = schema();
  return wanted === null ? {} : { response_format: { type: 'json_schema', json_schema: { name: 'answer', schema: wanted, strict: true } } };
}

async function send() {
  const box = part('prompt');
  const text = box.value.trim();
  if (running || !text) return;
  messages.push({ role: 'user', content: text });
  box.value = '';
  fitPrompt();
  if (!(await answer())) {
    messages.pop();
    box.value = text;
    fitPrompt();
  }
}

function act(name, message, text) {
  const index = messages.indexOf(message);
  if (name === 'schema' || name === 'key') {
    openPanel(true);
    if (name === 'key') askForKey();
    else showRefusal(message.error);
  } else if (!running && name === 'again') {
    messages = messages.slice(0, index);
    answer();
  } else if (!running && name === 'edit') {
    edit(message, index);
  } else if (!running && name === 'edited') {
    messages = [...messages.slice(0, index), { role: 'user', content: text }];
    answer();
  }
}

function showRefusal(error) {
  if (error.keyword || error.pointer) markRefusal(error);
  part('schema').focus();
  if (!part('schema-show').hidden) part('schema-show').click();
}

/** Put a box in the place of a message; what follows it is asked anew. */
function edit(message, index) {
  const box = make('textarea', { value: message.content, ariaLabel: 'Edit the message', rows: Math.min(8, message.content.split('\n').length + 1) });
  const save = make('button', { type: 'button', className: 'send' }, 'Send');
  const leave = make('button', { type: 'button', className: 'quiet' }, 'Leave it');
  const article = articles.get(message);
  const done = () => (drawOne(message), part('prompt').focus());
  save.addEventListener('click', () => box.value.trim() && act('edited', message, box.value.trim()));
  leave.addEventListener('click', done);
  box.addEventListener('keydown', (event) => {
    if (event.key === 'Escape') done();
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) (event.preventDefault(), save.click());
  });
  const later = messages.length - index - 1;
  article.querySelector('.body').replaceChildren(make('div', { className: 'editing' }, box));
  article.querySelector('.foot').replaceChildren(make('span', { className: 'soft' }, later > 1 ? `${later} later messages will go` : ''), leave, save);
  box.focus();
}

function drawAll() {
  for (const [message, article] of articles) {
    if (!messages.includes(message)) (article.remove(), articles.delete(message));
  }
  for (const message of messages) drawOne(message);
  part('welcome').hidden = messages.length > 0;
  part('export').disabled = part('clear').disabled = messages.length === 0;
}

function drawOne(message) {
  if (articles.has(message)) {
    redraw(articles.get(message), message, act);
  } else {
    articles.set(message, draw(message, act));
    part('log').append(articles.get(message));
  }
  if (isFollowing) part('scroller').scrollTop = part('scroller').scrollHeight;
}

function showRunning() {
  part('send').textContent = running ? 'Stop' : 'Send';
  part('send').classList.toggle('stop', Boolean(running));
  part('clear').disabled = Boolean(running) || messages.length === 0;
}

function showForm() {
  const text = { good: 'JSON schema', unchecked: 'JSON schema', checking: 'JSON schema …', bad: 'Schema refused' }[schemaState()] ?? 'JSON schema';
  part('schema-chip').setAttribute('aria-pressed', String(isSchemaOn()));
  part('schema-chip').classList.toggle('bad', isSchemaOn() && schemaState() === 'bad');
  part('schema-chip-text').textContent = isSchemaOn() ? text : 'Free text';
}

function openPanel(isOpen) {
  document.body.classList.toggle('with-panel', isOpen);
  part('open-panel').setAttribute('aria-expanded', String(isOpen));
  part('panel').inert = !isOpen;
}

function askForKey() {
  openPanel(true);
  part('key').focus();
}

function fitPrompt() {
  const box = part('prompt');
  box.style.height = 'auto';
  box.style.height = `${Math.min(box.scrollHeight, window.innerHeight / 3)}px`;
}

function wire() {
  part('composer').addEventListener('submit', (event) => {
    event.preventDefault();
    if (running) running.abort();
    else send();
  });
  part('prompt').addEventListener('input', fitPrompt);
  part('prompt').addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) (event.preventDefault(), send());
    if (event.key === 'ArrowUp' && !part('prompt').value) {
      const last = messages.findLast((message) => message.role === 'user');
      if (last) (event.preventDefault(), act('edit', last));
    }
  });
  document.addEventListener('keydown', (event) => {
    if (event.key === 'Escape' && running) running.abort();
    else if (event.key === 'Escape' && NARROW.matches) openPanel(false);
    if (event.key === '/' && document.activeElement === document.body) (event.preventDefault(), part('prompt').focus());
  });
  document.addEventListener('ferry-schema', showForm);
  part('open-panel').addEventListener('click', () => openPanel(!document.body.classList.contains('with-panel')));
  part('close-panel').addEventListener('click', () => (openPanel(false), part('open-panel').focus()));
  part('schema-chip').addEventListener('click', toggleSchema);
  part('export').addEventListener('click', () => exportFile(messages, { model: part('model').value, system: systemPrompt() }));
  part('clear').addEventListener('click', () => {
    messages = [];
    store(messages);
    drawAll();
    part('prompt').focus();
  });
  part('key').addEventListener('change', connect);
  part('scroller').addEventListener('scroll', () => {
    const { scrollTop, scrollHeight, clientHeight } = part('scroller');
    isFollowing = scrollHeight - scrollTop - clientHeight < 40;
    part('latest').hidden = isFollowing;
  });
  part('latest').addEventListener('click', () => (part('scroller').scrollTop = part('scroller').scrollHeight));
  part('starters').append(...STARTERS.map(([text, form]) => starter(text, form)));
}

function toggleSchema() {
  const isEmpty = part('schema').value.trim() === '';
  part('schema-on').checked = !isSchemaOn();
  part('schema-on').dispatchEvent(new Event('change'));
  keep();
  if (isEmpty || (isSchemaOn() && schemaState() === 'bad')) (openPanel(true), part('schema').focus());
}

function starter(text, form) {
  const element = make('button', { type: 'button' }, text);
  if (form) element.append(make('span', { className: 'soft' }, ' As JSON.'));
  element.addEventListener('click', () => {
    if (form) useSchema(form);
    else if (isSchemaOn()) toggleSchema();
    part('prompt').value = text;
    send();
  });
  return element;
}

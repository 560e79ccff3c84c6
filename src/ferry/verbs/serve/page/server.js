// Talking to the server that sent the page: its models, whether it is ready, a schema's check, and streamed answers.
// Every failure becomes one Refused with words for a person and the id that the server's log knows.

/** What the server, or the way to it, refused. `param`, `keyword`, `pointer` say where, if the server did. */
export class Refused extends Error {
  constructor(message, fields = {}) {
    super(message);
    Object.assign(this, { status: 0, code: '', param: '', keyword: '', pointer: '', requestId: '', waitS: 0 }, fields);
  }
}

/** Return the names and sizes of the models. */
export async function models(key, signal) {
  return (await (await ask('v1/models', key, { signal })).json()).data;
}

/** Return "" when the server is ready, else why it is not. */
export async function whyNotReady(key, signal) {
  try {
    await ask('ready', key, { signal });
    return '';
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    // Not every server has /ready: one that answers is taken at its word.
    return error.status && error.status !== 503 ? '' : error.message;
  }
}

/** Return {ok, notes} or {ok: false, message, keyword, pointer} for a schema. */
export async function checkSchema(schema, key, signal) {
  return (await ask('v1/guided/check', key, { body: { schema }, signal })).json();
}

/** Give the server-sent events of an answer as objects, as they come. */
export async function* stream(body, key, signal) {
  const response = await ask('v1/chat/completions', key, { body, signal });
  const requestId = response.headers.get('x-request-id') ?? '';
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === 'AbortError' ? error : new Refused('The connection was lost in the middle of the answer.', { requestId });
    });
    if (done) throw new Refused('The answer ended without its end mark: part of it may be missing.', { requestId });
    rest += value;
    const events = rest.split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith('data:')).map((line) => line.slice(5).trimStart()).join('\n');
      if (data === '[DONE]') return;
      if (!data) continue;
      const chunk = readEvent(data, requestId);
      if (chunk.error) throw refused(chunk.error, 0, requestId);
      yield chunk;
    }
  }
}

function readEvent(data, requestId) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Refused('The server sent something that is not JSON.', { requestId });
  }
}

async function ask(path, key, { body, signal } = {}) {
  const headers = {};
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers['content-type'] = 'application/json';
  const request = { method: body ? 'POST' : 'GET', headers, body: body && JSON.stringify(body), signal, cache: 'no-store' };
  let response;
  try {
    response = await fetch(path, request);
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Refused('The server cannot be reached. Is it still running?');
  }
  if (response.ok) return response;
  const requestId = response.headers.get('x-request-id') ?? '';
  const waitS = Number(response.headers.get('retry-after')) || 0;
  const text = await response.text();
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    error = { message: text.slice(0, 300) };
  }
  throw refused(error, response.status, requestId, waitS);
}

function refused(error, status, requestId, waitS = 0) {
  const { message = '', code = '', param = '', keyword = '', pointer = '', request_id = requestId } = error;
  return new Refused(message || `The server answered ${status} and nothing else.`, {
    status, code: String(code), param: param ?? '', keyword, pointer, requestId: request_id, waitS,
  });
}

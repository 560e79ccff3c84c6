// The box for a JSON schema. While one types: is it JSON, and if so, can the server keep it? What is wrong is marked
// where it stands and said below, with line and column.

import { make, part } from './elements.js';
import { JsonError, lineAndColumn, parseWithPlaces, placeOf } from './json.js';
import { checkSchema } from './server.js';
import { apiKey, keep } from './settings.js';

const PAUSE_MS = 250;
export const EXAMPLE = {
  type: 'object',
  properties: {
    name: { type: 'string', minLength: 1, maxLength: 40 },
    age: { type: 'integer', minimum: 0, maximum: 130 },
    languages: { type: 'array', items: { enum: ['English', 'French', 'German'] }, minItems: 1, maxItems: 3, uniqueItems: true },
  },
  required: ['name', 'age', 'languages'],
  additionalProperties: false,
};

let place = null;
let waiting = 0;
let asked = null;
let state = 'off';

/** Wire the box. `changed` is called when the form of the next answer is another one. */
export function openSchema(changed) {
  const box = part('schema');
  const look = () => {
    examine();
    changed();
  };
  box.addEventListener('input', () => {
    if (box.value.trim() && !part('schema-on').checked) part('schema-on').checked = true;
    look();
  });
  box.addEventListener('scroll', followScroll);
  part('schema-on').addEventListener('change', look);
  part('key').addEventListener('change', examine);
  part('schema-example').addEventListener('click', () => {
    useSchema(EXAMPLE);
    changed();
  });
  part('schema-format').addEventListener('click', () => {
    try {
      box.value = JSON.stringify(parseWithPlaces(box.value).value, null, 2);
      keep();
    } catch (error) {
      if (!(error instanceof JsonError)) throw error;
    }
    look();
  });
  part('schema-show').addEventListener('click', showPlace);
  examine();
}

/** Put a schema into the box and turn it on. */
export function useSchema(schema) {
  part('schema').value = JSON.stringify(schema, null, 2).replace(/\[\n\s+("[^\]]*?")\n\s+\]/g, (_, items) => `[${items.replace(/\n\s+/g, ' ')}]`);
  part('schema-on').checked = true;
  keep();
  examine();
}

export function isSchemaOn() {
  return part('schema-on').checked && part('schema').value.trim() !== '';
}

/** Return off, checking, good, unchecked (the server cannot say) or bad. */
export function schemaState() {
  return state;
}

/** Return the schema to send, or nothing. Raise where it is wrong. */
export function schema() {
  if (!isSchemaOn()) return null;
  if (state === 'bad') throw new Error('the schema is wrong');
  return parseWithPlaces(part('schema').value).value;
}

/** Mark the place that a refusal of the server names. */
export function markRefusal({ message, pointer, keyword }) {
  let places;
  try {
    ({ places } = parseWithPlaces(part('schema').value));
  } catch (error) {
    if (!(error instanceof JsonError)) throw error;
    return;
  }
  show('bad', message, placeOf(places, pointer, keyword));
}

/** Look at the schema anew: what the server could not say before, it may say now. */
export function examine() {
  clearTimeout(waiting);
  asked?.abort();
  const text = part('schema').value;
  if (!text.trim()) return show('off', 'Paste a schema: the answer will keep it, or the request is refused with the reason.');
  let read;
  try {
    read = parseWithPlaces(text);
  } catch (error) {
    if (!(error instanceof JsonError)) throw error;
    const start = Math.min(error.offset, Math.max(text.length - 1, 0));
    return show('bad', `Not JSON: ${error.message}`, { start, end: start + 1, key: start });
  }
  show('checking', 'Checking …');
  waiting = setTimeout(() => askServer(read), PAUSE_MS);
}

async function askServer({ value, places }) {
  asked = new AbortController();
  try {
    const verdict = await checkSchema(value, apiKey(), asked.signal);
    if (verdict.ok) show('good', ['This schema will be kept.', ...(verdict.notes ?? [])].join(' '));
    else show('bad', verdict.message, placeOf(places, verdict.pointer, verdict.keyword));
  } catch (error) {
    if (error.name === 'AbortError') return;
    if (error.status === 400) show('bad', error.message, placeOf(places, error.pointer, error.keyword));
    else show('unchecked', `JSON, but not checked: ${error.message}`);
  }
}

function show(newState, message, newPlace = null) {
  state = newState;
  place = newPlace;
  const text = part('schema').value;
  const verdict = part('schema-verdict');
  verdict.className = `verdict ${state}`;
  verdict.replaceChildren(make('span', {}, message));
  part('schema').setAttribute('aria-invalid', String(state === 'bad'));
  part('schema-show').hidden = !place;
  if (place) {
    const { line, column } = lineAndColumn(text, markedRange().start);
    verdict.prepend(make('b', {}, `Line ${line}, column ${column} `));
  }
  drawMirror(text);
  document.dispatchEvent(new Event('ferry-schema'));
}

/** What is marked: the first line of the value, with its name, or the one character that is wrong. */
function markedRange() {
  const text = part('schema').value;
  const start = place.key ?? place.start;
  const lineEnd = text.indexOf('\n', start);
  const end = lineEnd < 0 ? place.end : Math.min(place.end, lineEnd);
  return { start, end: Math.max(end, start + 1) };
}

function drawMirror(text) {
  const mirror = part('schema-mirror');
  part('schema-lines').textContent = text.split('\n').map((_, index) => index + 1).join('\n');
  if (place) {
    const { start, end } = markedRange();
    const marked = text.slice(start, end).replace(/^\n?$/, ' ');
    mirror.replaceChildren(text.slice(0, start), make('mark', {}, marked), `${text.slice(end)}\n`);
  } else {
    mirror.replaceChildren();
  }
  followScroll();
}

function followScroll() {
  const { scrollTop, scrollLeft } = part('schema');
  part('schema-mirror').style.transform = `translate(${-scrollLeft}px, ${-scrollTop}px)`;
  part('schema-lines').style.transform = `translateY(${-scrollTop}px)`;
}

function showPlace() {
  const { start, end } = markedRange();
  const box = part('schema');
  box.focus();
  box.setSelectionRange(start, end);
  const lineHeight = parseFloat(getComputedStyle(box).lineHeight);
  box.scrollTop = (lineAndColumn(box.value, start).line - 3) * lineHeight;
}

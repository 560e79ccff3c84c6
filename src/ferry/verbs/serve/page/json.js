// JSON with places: where an error is, by line and column, and where each value is, by JSON pointer.
// And the other way: JSON as it arrives, also half of it, laid out in lines.

/** A text that is not JSON. `offset` is where. */
export class JsonError extends Error {
  constructor(message, offset) {
    super(message);
    this.offset = offset;
  }
}

/** Return {value, places}: `places` maps each JSON pointer to {start, end, key} in the text; `key` is its name's start. */
export function parseWithPlaces(text) {
  const places = new Map();
  let at = 0;

  function fail(message, offset = at) {
    throw new JsonError(message, offset);
  }
  function blanks() {
    while (at < text.length && ' \t\n\r'.includes(text[at])) at += 1;
  }
  function found() {
    return at < text.length ? `found ${JSON.stringify(text[at])}` : 'the text ends';
  }
  function string(what) {
    const start = at;
    if (text[at] !== '"') fail(`expected ${what} in double quotes, ${found()}`);
    at += 1;
    while (text[at] !== '"') {
      if (at >= text.length) fail('a string has no end', start);
      if (text[at] < ' ') fail('a line break or control character in a string: write \\n or \\u....');
      if (text[at] === '\\' && !/^\\(["\\/bfnrt]|u[0-9a-fA-F]{4})/.test(text.slice(at, at + 6))) fail('unknown escape in a string');
      at += text[at] === '\\' ? 2 : 1;
    }
    at += 1;
    return JSON.parse(text.slice(start, at));
  }
  function word() {
    const match = /^(?:-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null)(?![\w.+-])/.exec(text.slice(at, at + 400));
    if (!match) {
      const strange = /^[^\s,\]}:"]+/.exec(text.slice(at, at + 40));
      fail(strange ? `${strange[0]} is no JSON value` : `expected a value, ${found()}`);
    }
    at += match[0].length;
    return JSON.parse(match[0]);
  }
  function members(pointer, close, one) {
    at += 1;
    blanks();
    if (text[at] === close) {
      at += 1;
      return;
    }
    for (let index = 0; ; index += 1) {
      blanks();
      one(index, pointer);
      blanks();
      if (text[at] === close) break;
      if (text[at] !== ',') fail(`expected a comma or ${close}, ${found()}`);
      at += 1;
      blanks();
      if (text[at] === close) fail(`a comma before ${close}`, text.lastIndexOf(',', at));
    }
    at += 1;
  }
  function value(pointer, key, depth) {
    if (depth > 200) fail('nested too deeply');
    blanks();
    const start = at;
    let result;
    if (text[at] === '{') {
      const names = new Map();
      members(pointer, '}', () => {
        const nameStart = at;
        const name = string('a name');
        if (names.has(name)) fail(`the name ${JSON.stringify(name)} is here twice`, nameStart);
        blanks();
        if (text[at] !== ':') fail(`expected a colon after ${JSON.stringify(name)}, ${found()}`);
        at += 1;
        names.set(name, value(`${pointer}/${escaped(name)}`, nameStart, depth + 1));
      });
      result = Object.fromEntries(names);
    } else if (text[at] === '[') {
      result = [];
      members(pointer, ']', (index) => result.push(value(`${pointer}/${index}`, at, depth + 1)));
    } else {
      result = text[at] === '"' ? string('a text') : word();
    }
    places.set(pointer, { start, end: at, key });
    return result;
  }

  const result = value('', 0, 0);
  blanks();
  if (at < text.length) fail(`expected the end, ${found()}`);
  return { value: result, places };
}

/** Return {line, column} of an offset, both from 1. */
export function lineAndColumn(text, offset) {
  const before = text.slice(0, offset);
  const line = before.split('\n').length;
  return { line, column: offset - before.lastIndexOf('\n') };
}

/** Return the place of a keyword in the value at a pointer such as `#/properties/age`, or the nearest place above. */
export function placeOf(places, pointer, keyword = '') {
  let path = (pointer ?? '').replace(/^#/, '');
  try {
    path = decodeURIComponent(path);
  } catch {
    // A plain pointer may hold a percent sign that starts no escape: it is meant as it stands.
  }
  path += keyword && `/${escaped(keyword)}`;
  while (path && !places.has(path)) path = path.slice(0, path.lastIndexOf('/'));
  return places.get(path);
}

/** Return JSON, or the beginning of it, as pieces [kind, text] laid out in lines. Kinds: key, string, word, mark. */
export function layOut(text) {
  const pieces = [];
  const stack = [];
  let isName = false;
  const line = () => pieces.push(['mark', '\n' + '  '.repeat(stack.length)]);
  for (const [token] of text.matchAll(/"(?:[^"\\]|\\.)*(?:"|\\?$)|[{}[\],:]|[^\s{}[\],:"]+/gs)) {
    if (token === '{' || token === '[') {
      pieces.push(['mark', token]);
      stack.push(token);
      isName = token === '{';
      pieces.push(['open', '']);
      line();
    } else if (token === '}' || token === ']') {
      stack.pop();
      isName = false;
      if (pieces.at(-2)?.[0] === 'open') pieces.splice(-2);
      else line();
      pieces.push(['mark', token]);
    } else if (token === ',') {
      pieces.push(['mark', ',']);
      isName = stack.at(-1) === '{';
      line();
    } else if (token === ':') {
      pieces.push(['mark', ': ']);
      isName = false;
    } else {
      pieces.push([token[0] !== '"' ? 'word' : isName ? 'key' : 'string', token]);
    }
  }
  return pieces.filter(([kind]) => kind !== 'open');
}

function escaped(name) {
  return name.replace(/~/g, '~0').replace(/\//g, '~1');
}

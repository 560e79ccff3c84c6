// A little Markdown as elements: code blocks, lists, headings, bold, slanted, code. Text is only ever set as text, so
// nothing that a model writes becomes markup of the page.

import { copyButton, make } from './elements.js';

const FENCE = /^\s*(```+|~~~+)\s*([\w+#.-]*)\s*$/;
const ITEM = /^(\s*)(?:([-*+])|(\d{1,9})[.)])\s+(.*)$/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const INLINE = /(`+)(.+?)\1(?!`)|\*\*(?=\S)(.+?)(?<=\S)\*\*|\*(?=\S)([^*\n]+?)(?<=\S)\*(?!\w)/gs;

/** Return the elements of a text. */
export function markdown(text) {
  const lines = text.split('\n');
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    const fence = FENCE.exec(lines[at]);
    const heading = HEADING.exec(lines[at]);
    if (!lines[at].trim()) {
      at += 1;
    } else if (fence) {
      const start = at + 1;
      at = start;
      while (at < lines.length && !lines[at].trim().startsWith(fence[1])) at += 1;
      blocks.push(codeBlock(lines.slice(start, at).join('\n'), fence[2]));
      at += 1;
    } else if (heading) {
      blocks.push(make('p', { className: 'heading' }, ...inline(heading[2])));
      at += 1;
    } else if (ITEM.test(lines[at])) {
      const start = at;
      while (at < lines.length && belongsToList(lines, at)) at += 1;
      blocks.push(list(lines.slice(start, at)));
    } else {
      const start = at;
      while (at < lines.length && lines[at].trim() && !FENCE.test(lines[at]) && !HEADING.test(lines[at]) && (at === start || !ITEM.test(lines[at]))) at += 1;
      blocks.push(make('p', {}, ...inline(lines.slice(start, at).join('\n'))));
    }
  }
  return blocks;
}

function belongsToList(lines, at) {
  if (ITEM.test(lines[at]) || /^\s+\S/.test(lines[at])) return true;
  const next = lines.slice(at).find((line) => line.trim());
  return !lines[at].trim() && next !== undefined && ITEM.test(next);
}

function list(lines) {
  const base = indent(lines[0]);
  const first = ITEM.exec(lines[0]);
  const element = make(first[2] ? 'ul' : 'ol', first[3] ? { start: Number(first[3]) } : {});
  let at = 0;
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    const start = (at += 1);
    while (at < lines.length && (!ITEM.test(lines[at]) || indent(lines[at]) > base)) at += 1;
    const inner = lines.slice(start, at);
    const nested = inner.findIndex((line) => ITEM.test(line));
    const plain = (nested < 0 ? inner : inner.slice(0, nested)).map((line) => line.trim()).filter(Boolean);
    const own = make('li', {}, ...inline([item?.[4] ?? lines[start - 1].trim(), ...plain].join('\n')));
    if (nested >= 0) own.append(list(inner.slice(nested)));
    element.append(own);
  }
  return element;
}

function indent(line) {
  return line.length - line.trimStart().length;
}

function inline(text) {
  const parts = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > at) parts.push(text.slice(at, match.index));
    if (match[2] !== undefined) parts.push(make('code', {}, match[2]));
    else if (match[3] !== undefined) parts.push(make('strong', {}, ...inline(match[3])));
    else parts.push(make('em', {}, match[4]));
    at = match.index + match[0].length;
  }
  if (at < text.length) parts.push(text.slice(at));
  return parts;
}

function codeBlock(code, language) {
  const head = make('figcaption', {}, make('span', {}, language || 'text'), copyButton(() => code));
  return make('figure', { className: 'code' }, head, make('pre', { tabIndex: 0 }, make('code', {}, code)));
}

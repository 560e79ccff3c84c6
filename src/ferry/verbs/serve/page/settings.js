// The controls of the side panel: their values, kept in the tab, and the fields of a request that come of them.

import { make, part } from './elements.js';

const NUMBERS = ['temperature', 'top_p', 'top_k', 'max_tokens', 'seed'];
const KEPT = ['system', 'theme', 'schema', ...NUMBERS];
const SWITCHES = ['logprobs', 'schema-on'];

/** Fill the controls from the last visit of this tab, and keep them from now on. */
export function openSettings() {
  for (const id of [...KEPT, 'key']) part(id).value = sessionStorage.getItem(`ferry.${id}`) ?? part(id).value;
  for (const id of SWITCHES) part(id).checked = sessionStorage.getItem(`ferry.${id}`) === 'yes';
  part('panel').addEventListener('input', keep);
  part('theme').addEventListener('change', () => showTheme(part('theme').value));
  showTheme(part('theme').value);
  for (const id of NUMBERS) part(id).addEventListener('input', () => markWrong('', ''));
}

/** Keep every control now; for changes that no one typed. */
export function keep() {
  for (const id of [...KEPT, 'key']) sessionStorage.setItem(`ferry.${id}`, part(id).value);
  for (const id of SWITCHES) sessionStorage.setItem(`ferry.${id}`, part(id).checked ? 'yes' : 'no');
}

/** Return the fields of a request that the controls ask for; raise the first problem as a text. */
export function sampling() {
  const fields = {};
  for (const id of NUMBERS) {
    const input = part(id);
    if (!input.validity.valid) {
      const name = input.labels[0].firstChild.textContent.trim();
      markWrong(id, `${name}: ${input.validity.badInput ? 'not a number' : bounds(input)}`);
      throw new Error(`${name} is wrong`);
    }
    if (input.value !== '') fields[id] = Number(input.value);
  }
  if (part('logprobs').checked) Object.assign(fields, { logprobs: true, top_logprobs: 5 });
  return fields;
}

/** Mark the control that a refusal names. Return whether there is one. */
export function markWrong(id, message) {
  for (const other of NUMBERS) part(other).removeAttribute('aria-invalid');
  part('sampling-problem').textContent = '';
  if (!NUMBERS.includes(id)) return false;
  part(id).setAttribute('aria-invalid', 'true');
  part('sampling-problem').replaceChildren(make('span', {}, message));
  return true;
}

export function systemPrompt() {
  return part('system').value.trim();
}

export function apiKey() {
  return part('key').value.trim();
}

function bounds(input) {
  if (input.validity.stepMismatch && input.step === '1') return 'a whole number';
  return input.max ? `from ${input.min} to ${input.max}` : `at least ${input.min}`;
}

function showTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

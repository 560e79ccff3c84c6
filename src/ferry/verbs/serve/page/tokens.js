// An answer token by token, each in the colour of its probability. The pointer or the arrow keys show what else was
// likely at that place.

import { make } from './elements.js';

const NUM_SHADES = 5;

/** Return the view of tokens {text, logprob, top: [{text, logprob}]}. */
export function tokenView(tokens) {
  const tip = make('div', { className: 'tip', hidden: true });
  const text = make('div', { className: 'tokens', tabIndex: 0, role: 'group', ariaLabel: 'Tokens by probability; arrow keys go from one to the next' });
  const spans = tokens.map((token) => make('span', { className: `token p${shade(token.logprob)}` }, token.text));
  text.append(...spans);
  const view = make('div', { className: 'token-view' }, text, tip);
  let chosen = -1;

  function choose(index) {
    spans[chosen]?.classList.remove('chosen');
    chosen = Math.max(-1, Math.min(index, spans.length - 1));
    tip.hidden = chosen < 0;
    if (chosen < 0) return;
    spans[chosen].classList.add('chosen');
    tip.replaceChildren(...rows(tokens[chosen]));
    const box = view.getBoundingClientRect();
    const spot = (spans[chosen].getClientRects()[0] ?? box);
    tip.style.left = `${Math.max(0, Math.min(spot.left - box.left, box.width - tip.offsetWidth))}px`;
    tip.style.top = `${spot.bottom - box.top + 6}px`;
  }
  text.addEventListener('pointermove', (event) => choose(spans.indexOf(event.target)));
  text.addEventListener('pointerleave', () => choose(-1));
  text.addEventListener('blur', () => choose(-1));
  text.addEventListener('keydown', (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    choose(Math.max(0, chosen + step));
  });
  return view;
}

function rows(token) {
  const others = token.top.filter((other) => other.text !== token.text || other.logprob !== token.logprob);
  return [token, ...others].map((one, index) =>
    make('div', { className: index ? '' : 'taken' }, make('code', {}, JSON.stringify(one.text).slice(1, -1)), make('span', {}, percent(one.logprob))),
  );
}

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return `${share >= 10 ? share.toFixed(0) : share >= 0.1 ? share.toFixed(1) : '< 0.1'} %`;
}

/** 0 for what the model was sure of, up to the last shade for what it hardly expected. */
function shade(logprob) {
  const probability = Math.exp(logprob);
  return [0.9, 0.6, 0.3, 0.1].filter((edge) => probability < edge).length % NUM_SHADES;
}

// The few things every part of the page does with elements. Children are elements or plain text, never markup.

/** Return an element with properties and children. */
export function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

/** Return the element of an id. */
export function part(id) {
  return document.getElementById(id);
}

/** Return a button that copies a text and says so. */
export function copyButton(text) {
  const button = make('button', { type: 'button', className: 'act' }, 'Copy');
  button.addEventListener('click', async () => {
    button.textContent = (await copy(text())) ? 'Copied' : 'Not allowed';
    setTimeout(() => (button.textContent = 'Copy'), 1400);
  });
  return button;
}

/** Say something to those who listen to the page. */
export function say(text) {
  part('said').textContent = text;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // No clipboard without TLS: the old way works in a click.
    const area = make('textarea', { value: text, className: 'unseen' });
    document.body.append(area);
    area.select();
    const done = document.execCommand('copy');
    area.remove();
    return done;
  }
}

// Elements and words. Text from files reaches the page only as text nodes and attribute values, never as HTML.

const byId = (id) => document.getElementById(id);

/** Create an element: properties, listeners (`onclick`) and attributes by name, then children. */
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function drawn(tag, attributes = {}) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** A score in three decimals, or fewer if it is large. */
function scoreText(value) {
  if (value === null) return "–";
  const size = Math.abs(value);
  return value.toFixed(size >= 1000 ? 0 : size >= 100 ? 1 : size >= 10 ? 2 : 3).replace("-", "−");
}

const signedText = (value) => (value > 0 ? "+" : "") + scoreText(value);
const countText = (value) => value.toLocaleString("en");
const plural = (value, noun) => `${countText(value)} ${noun}${value === 1 ? "" : "s"}`;
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// Previews and maps. Those inside the page are in elements behind the script, which may still be on their way.

const CHUNKS_KEPT = 40;
const chunks = new Map(); // number -> array of base64, the latest last
const waiting = [];

function isComplete(holder) {
  return holder !== null && (holder.nextElementSibling !== null || document.readyState !== "loading");
}

function chunk(number) {
  const kept = chunks.get(number);
  if (kept) {
    chunks.delete(number);
    chunks.set(number, kept);
    return kept;
  }
  const holder = byId(`previews-${number}`);
  if (!isComplete(holder)) return null;
  const parsed = JSON.parse(holder.textContent);
  chunks.set(number, parsed);
  if (chunks.size > CHUNKS_KEPT) chunks.delete(chunks.keys().next().value);
  return parsed;
}

/** Address of a row's preview; null if it has none; undefined if it has not arrived yet. */
function previewAddress(row) {
  if (data.previewAddresses) return data.previewAddresses[row] ?? null;
  const slot = data.previewSlots ? data.previewSlots[row] : -1;
  if (slot < 0) return null;
  const [first, size] = data.chunks;
  const number = slot < first ? 0 : 1 + Math.floor((slot - first) / size);
  const found = chunk(number);
  if (found === null) return document.readyState === "loading" ? undefined : null;
  return `data:${data.previewType};base64,${found[number ? (slot - first) % size : slot]}`;
}

/** Show a row's preview in an image as soon as it is there. */
function showPreview(image, row) {
  image.dataset.row = row;
  const address = previewAddress(row);
  if (address) image.src = address;
  else if (address === undefined) waiting.push([image, row]);
}

function servePreviews() {
  for (const [image, row] of waiting.splice(0)) if (Number(image.dataset.row) === row) showPreview(image, row);
}

if (document.readyState === "loading") {
  const observer = new MutationObserver(servePreviews);
  observer.observe(document.body, { childList: true });
  document.addEventListener("DOMContentLoaded", () => {
    observer.disconnect();
    servePreviews();
  });
}

/** The maps of a row; an empty list if it has none, or they have not arrived yet. */
function mapsOf(row) {
  const holder = byId(`maps-${data.mapped.indexOf(row)}`);
  return isComplete(holder) ? JSON.parse(holder.textContent) : [];
}

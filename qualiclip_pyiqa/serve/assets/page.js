// Sends an image to the server, and shows its scores and map.

const state = { file: null, url: null, about: null, run: 0 };

// A score's place between the ends of its range, if the metric states them.
function share(column, score) {
  const [low, high] = (state.about?.columns[column]?.score_range ?? "").split(",").map(Number);
  return high > low ? Math.min(1, Math.max(0, (score - low) / (high - low))) : null;
}

// The attribute alone where there is one metric, whose name is above.
function labelOf(column) {
  const names = state.about.metrics.map((metric) => metric.name);
  return names.length === 1 && column.startsWith(`${names[0]}.`) ? column.slice(names[0].length + 1) : column;
}

async function describe() {
  const answer = await fetch("describe");
  if (!answer.ok) throw new Error((await answer.json()).error);
  const about = (state.about = await answer.json());
  byId("metrics").textContent = about.metrics.map((metric) => metric.name).join(", ");
  const { bytes, pixels } = about.limits;
  byId("limits").textContent =
    `Images of up to ${Math.floor(bytes / 1e6)} MB and ${Math.floor(pixels / 1e6)} megapixels are scored on this server, and kept nowhere.`;
  for (const metric of about.metrics) {
    for (const attribute of metric.maps) {
      const text = about.metrics.length > 1 ? `${metric.name}, ${attribute}` : attribute;
      byId("attribute").append(element("option", { value: JSON.stringify([metric.name, attribute]) }, text));
    }
  }
  byId("controls").hidden = !byId("attribute").options.length;
}

const described = describe();

async function score(file) {
  const run = ++state.run;
  const isNew = file !== state.file;
  state.file = file;
  byId("error").hidden = true;
  byId("result").classList.add("busy");
  byId("status").textContent = isNew ? `Scoring ${file.name}` : "Drawing the map";
  if (isNew) show(file);
  try {
    await described;
    const query = new URLSearchParams();
    if (byId("attribute").value) {
      const [metric, attribute] = JSON.parse(byId("attribute").value);
      for (const [name, value] of Object.entries({ map: "png", metric, attribute })) query.set(name, value);
    }
    const response = await fetch(`score?${query}`, {
      method: "POST",
      body: file,
      headers: { "Content-Type": "application/octet-stream" },
    });
    const text = await response.text();
    if (run !== state.run) return;
    if (!response.ok) throw new Error(lineOf(text, response.status));
    fill(file, JSON.parse(text));
    byId("status").textContent = `${file.name} is scored`;
    if (isNew) byId("result").focus({ preventScroll: true });
  } catch (error) {
    if (run !== state.run) return;
    byId("status").textContent = "";
    byId("error").textContent = error instanceof TypeError ? "The server does not answer." : error.message;
    byId("error").hidden = false;
    byId("result").hidden = true;
    state.file = null;
  } finally {
    if (run === state.run) byId("result").classList.remove("busy");
  }
}

// The server's own words; Ray's proxy, as of an overloaded server, answers in plain text.
function lineOf(text, status) {
  try {
    return JSON.parse(text).error;
  } catch {
    return status === 503 ? "The server is overloaded. Try again later." : `The server fails (status ${status}).`;
  }
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1);

function show(file) {
  if (state.url) URL.revokeObjectURL(state.url);
  state.url = URL.createObjectURL(file);
  byId("unseen").hidden = true;
  byId("image").hidden = false;
  byId("overlay").hidden = true;
  byId("large").hidden = true;
  byId("image").src = state.url;
  byId("image").alt = file.name;
}

function fill(file, answer) {
  byId("drop").classList.add("compact");
  byId("result").hidden = false;
  byId("name").textContent = file.name;
  byId("facts").textContent = `${answer.width} x ${answer.height} pixels`;
  const list = byId("scores");
  list.replaceChildren();
  for (const [column, value] of Object.entries(answer.scores)) {
    const item = element("li");
    item.append(element("span", { className: "label" }, labelOf(column)), element("b", { className: "number" }, scoreText(value)));
    const place = share(column, value);
    if (place !== null) {
      const bar = element("i");
      bar.style.width = `${100 * place}%`;
      item.append(element("span", { className: "track" }, bar));
    }
    item.append(element("span", { className: "rank" }, answer.meanings[column]));
    list.append(item);
  }
  if (answer.error) list.append(element("li", { className: "note" }, answer.error));
  const map = answer.map;
  byId("overlay").hidden = !map;
  if (!map) return;
  byId("overlay").src = map.png;
  byId("low").textContent = scoreText(map.low);
  byId("high").textContent = scoreText(map.high);
  byId("large").textContent = map.note ? `${sentence(map.note)}.` : "";
  byId("large").hidden = !map.note;
  byId("words").textContent = `${map.attribute}: ${map.meaning}; ${map.relation}.`;
}

function take(files) {
  const file = [...(files ?? [])][0];
  if (file) score(file);
}

byId("file").addEventListener("change", (event) => {
  take(event.target.files);
  event.target.value = ""; // so that the same file can be chosen again
});
byId("attribute").addEventListener("change", () => state.file && score(state.file));
byId("strength").addEventListener("input", () => (byId("overlay").style.opacity = byId("strength").value / 100));
byId("image").addEventListener("error", () => {
  byId("image").hidden = true;
  byId("overlay").hidden = true;
  byId("unseen").hidden = false;
});
document.addEventListener("paste", (event) => take(event.clipboardData.files));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("drop").classList.add("over");
});
document.addEventListener("dragleave", (event) => event.relatedTarget || byId("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  take(event.dataTransfer.files);
});
byId("overlay").style.opacity = 0.8;
described.catch((error) => {
  byId("error").textContent = `The server does not answer (${error.message}).`;
  byId("error").hidden = false;
});
startTheme();

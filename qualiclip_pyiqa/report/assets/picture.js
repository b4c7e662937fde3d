// One image: its picture, its quality maps over it, its place in every column, its near-duplicates.

const picture = { row: null, maps: [], column: null, opener: null, original: false };

/** Ends of the scale that all maps of a column share. */
const mapScale = (column) => data.mapScales[column];

function openPicture(row) {
  const dialog = byId("picture");
  if (!dialog.open) {
    picture.opener = document.activeElement;
    dialog.showModal();
  }
  showPicture(row);
}

function showPicture(row) {
  picture.row = row;
  picture.maps = mapsOf(row);
  const rank = state.shown.indexOf(row);
  const [width, height] = data.sizes[row];
  byId("picture-name").replaceChildren(element("bdi", { textContent: baseName(row) }));
  byId("picture-facts").replaceChildren(
    element("bdi", { textContent: data.shownFolder + nameOf(row) }),
    width ? ` · ${width} × ${height} pixels` : "",
  );
  byId("place").textContent = rank < 0 ? "" : `${countText(rank + 1)} of ${countText(state.shown.length)}`;
  byId("previous").disabled = rank <= 0;
  byId("next").disabled = rank < 0 || rank >= state.shown.length - 1;
  byId("picture-error").hidden = !(row in data.errors);
  byId("picture-error").textContent = data.shownErrors[row] ?? "";
  showLinks(row);
  showProfile(row);
  showSimilar(row);
  chooseActual(false);
  showImage(row);
  listMaps();
  showMap();
}

const addressOf = (row, run) => {
  const address = data.links[row][run];
  return address === null || address === undefined ? null : data.linkStart + address;
};

function showLinks(row) {
  const links = data.links[row].flatMap((_, run) => {
    const address = addressOf(row, run);
    if (address === null) return [];
    const text = data.runs.length > 1 ? `Open the file of ${data.runs[run]}` : "Open the file";
    return [element("a", { href: address, target: "_blank", rel: "noopener noreferrer", textContent: text })];
  });
  byId("picture-links").replaceChildren(...links);
}

/** Show the preview at once, and the file itself when the browser has it. */
function showImage(row) {
  const image = byId("full");
  image.removeAttribute("src");
  image.alt = baseName(row);
  picture.original = false;
  showPreview(image, row);
  fitImage();
  const [width, height] = data.sizes[row];
  const [ours] = data.previewSizes[row] ?? [0];
  const address = data.links[row].map((_, run) => addressOf(row, run)).findLast((each) => each !== null);
  byId("actual").hidden = true;
  if (!address || !ours || !width || width * height > 5e7) return;
  const original = new Image();
  original.onload = () => {
    if (picture.row !== row) return;
    image.src = address;
    picture.original = true;
    byId("actual").hidden = false;
  };
  original.src = address;
}

/** Give the picture its size: all of it in the view, or a pixel for a pixel. */
function fitImage() {
  const view = byId("view");
  const [width, height] = data.sizes[picture.row].every(Boolean)
    ? data.sizes[picture.row]
    : (data.previewSizes[picture.row] ?? [4, 3]);
  const style = getComputedStyle(view);
  const room = [
    view.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight),
    view.clientHeight - parseFloat(style.paddingTop) - parseFloat(style.paddingBottom),
  ];
  const actual = view.classList.contains("actual");
  const scale = actual ? 1 / devicePixelRatio : Math.min(room[0] / width, room[1] / height);
  byId("canvas").style.width = `${width * scale}px`;
  byId("canvas").style.height = `${height * scale}px`;
}

function chooseActual(actual) {
  byId("view").classList.toggle("actual", actual);
  byId("actual").setAttribute("aria-pressed", String(actual));
  if (picture.row !== null) fitImage();
}

function listMaps() {
  const select = byId("map-of");
  const options = [element("option", { value: "", textContent: "off" })];
  for (const each of picture.maps) {
    options.push(element("option", { value: each.column, textContent: columns[each.column].label }));
  }
  select.replaceChildren(...options);
  select.value = picture.maps.some((each) => each.column === picture.column) ? picture.column : "";
  byId("map-controls").hidden = picture.maps.length === 0;
}

/** Draw the chosen map: low values in red and orange, high ones transparent. */
function showMap() {
  const canvas = byId("map");
  const found = picture.maps.find((each) => each.column === picture.column);
  canvas.hidden = !found;
  byId("legend").hidden = !found;
  byId("map-words").hidden = !found;
  byId("map-note").hidden = true;
  byId("strength-field").hidden = !found;
  if (!found) return;
  const bytes = Uint8Array.from(atob(found.data), (character) => character.charCodeAt(0));
  const [low, high] = mapScale(found.column);
  const [red, orange] = ["low", "middle"].map((name) => variable(name).split(",").map(Number));
  canvas.width = found.width;
  canvas.height = found.height;
  const pixels = new ImageData(found.width, found.height);
  bytes.forEach((byte, place) => {
    const value = found.low + ((found.high - found.low) * byte) / 255;
    const share = clamp((value - low) / (high - low), 0, 1);
    const blend = Math.min(1, 2 * share);
    for (let part = 0; part < 3; part++) {
      pixels.data[4 * place + part] = red[part] + (orange[part] - red[part]) * blend;
    }
    pixels.data[4 * place + 3] = 255 * (1 - share);
  });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  canvas.style.height = `${100 * found.extent[0]}%`;
  canvas.style.width = `${100 * found.extent[1]}%`;
  canvas.style.opacity = byId("strength").value / 100;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Quality map of ${columns[found.column].shown}: low values are coloured`);
  byId("legend-low").textContent = scoreText(low);
  byId("legend-high").textContent = scoreText(high);
  byId("map-words").textContent = `${(data.mapWords[found.column] ?? []).join("; ")}. One scale for all images.`;
  const note = data.mapNotes[found.note];
  byId("map-note").hidden = !note;
  byId("map-note").textContent = note ? `${note[0].toUpperCase()}${note.slice(1)}.` : "";
}

/** A bar for each column: the middle half of the table, and where this image is. */
function showProfile(row) {
  const items = columns.map((column, index) => {
    const value = valueOf(index, row);
    const domain = domainOf(index);
    const at = (number) => `${(100 * (number - domain[0])) / (domain[1] - domain[0])}%`;
    const track = element("div", { className: "track", "aria-hidden": "true" });
    if (sorted(index).length) {
      const [low, high] = [quantile(index, 0.25), quantile(index, 0.75)];
      const middle = element("span", { className: "middle" });
      middle.style.left = at(low);
      middle.style.right = `calc(100% - ${at(high)})`;
      track.append(middle);
    }
    if (value !== null) {
      const mark = element("span", { className: "mark" });
      mark.style.left = at(value);
      track.append(mark);
    }
    const z = (outliersOf.get(row) ?? []).find(([where]) => where === index)?.[1];
    const rank = element("span", { className: "rank" });
    rank.append(rankText(index, row));
    if (z !== undefined) rank.append(" · ", element("b", { textContent: `outlier, ${z > 0 ? "+" : "−"}${Math.abs(z).toFixed(1)} deviations` }));
    return element(
      "li",
      {},
      element("bdi", { className: "label", textContent: column.label, title: column.shown }),
      element("span", { className: "number", textContent: column.run === null && value !== null ? signedText(value) : scoreText(value) }),
      track,
      rank,
    );
  });
  byId("profile").replaceChildren(...items);
}

/** A button with a small picture, a name and what else is given, that opens an image. */
function pictureButton(row, ...more) {
  const image = element("img", { className: "small", alt: "" });
  if (previewAddress(row) !== null) showPreview(image, row);
  const button = element(
    "button",
    { type: "button", title: nameOf(row) },
    image,
    element("span", { className: "name" }, element("bdi", { textContent: baseName(row) }), ...more.slice(1)),
    ...more.slice(0, 1),
  );
  button.addEventListener("click", () => openPicture(row));
  return button;
}

function showSimilar(row) {
  const others = (duplicatesOf.get(row) ?? []).filter((each) => each !== row).slice(0, 20);
  byId("similar-part").hidden = !others.length;
  byId("similar").replaceChildren(
    ...others.map((each) =>
      element("li", {}, pictureButton(each, element("span", { textContent: scoreText(valueOf(shownColumn(), each)) }))),
    ),
  );
}

function step(by) {
  const rank = state.shown.indexOf(picture.row);
  const row = rank < 0 ? undefined : state.shown[rank + by];
  if (row !== undefined) showPicture(row);
}

function startPicture() {
  const dialog = byId("picture");
  byId("close").addEventListener("click", () => dialog.close());
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("actual").addEventListener("click", () => chooseActual(!byId("view").classList.contains("actual")));
  byId("map-of").addEventListener("change", (event) => {
    picture.column = event.target.value === "" ? null : Number(event.target.value);
    showMap();
  });
  byId("strength").addEventListener("input", (event) => {
    byId("map").style.opacity = event.target.value / 100;
  });
  dialog.addEventListener("keydown", (event) => {
    const typing = ["INPUT", "SELECT"].includes(event.target.tagName) || event.target.closest(".view.actual");
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowLeft") step(-1);
    else if (event.key === "ArrowRight") step(1);
    else return;
    event.preventDefault();
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // outside of it
  });
  dialog.addEventListener("close", () => {
    const rank = state.shown.indexOf(picture.row);
    const inGallery = byId("cards").contains(picture.opener) || !picture.opener?.isConnected;
    if (inGallery && rank >= 0 && !byId("panel-images").hidden) focusCard(rank);
    else picture.opener?.focus();
    picture.row = null;
  });
  new ResizeObserver(() => {
    if (dialog.open && picture.row !== null) fitImage();
  }).observe(byId("view"));
  themeListeners.push(() => {
    if (picture.row !== null) showMap();
  });
}

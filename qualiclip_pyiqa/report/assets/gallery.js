// The images in order. Only those near the window exist as elements, however many there are.

const GAP = 18;
const FOOT = 52; // pixels of a card below its picture
const AHEAD = 600; // pixels above and below the window

const gallery = { across: 1, width: 0, height: 0, cards: new Map(), current: 0 };

function layOut() {
  const width = byId("gallery").clientWidth;
  if (!width) return;
  const least = width < 560 ? 150 : 215;
  gallery.across = Math.max(1, Math.floor((width + GAP) / (least + GAP)));
  gallery.width = (width - GAP * (gallery.across - 1)) / gallery.across;
  gallery.height = (gallery.width * 3) / 4 + FOOT + GAP;
}

/** The column whose score is on the cards. */
const shownColumn = () => (Number.isNaN(Number(state.sort)) ? firstColumn : Number(state.sort));

function cardOf(row) {
  const column = shownColumn();
  const image = element("img", { alt: "", decoding: "async", draggable: false });
  const frame = element("span", { className: "frame" });
  if (previewAddress(row) === null) {
    // An error may be of any kind, such as an image that is too small; the image's own page tells it.
    const why = row in data.errors && (column === null || valueOf(column, row) === null) ? "no score" : "no picture";
    frame.append(element("span", { className: "missing", textContent: why }));
  } else {
    showPreview(image, row);
    frame.append(image);
  }
  const tags = element("span", { className: "tags" });
  if (outliersOf.has(row)) tags.append(element("span", { className: "tag", textContent: "outlier" }));
  if (duplicatesOf.has(row)) {
    tags.append(element("span", { className: "tag", textContent: `${duplicatesOf.get(row).length} alike` }));
  }
  if (row in data.errors) tags.append(element("span", { className: "tag", textContent: "error" }));
  frame.append(tags);
  const share = column === null ? null : betterThan(column, row);
  const fill = element("i");
  fill.style.width = `${100 * (share ?? 0)}%`;
  const button = element(
    "button",
    { type: "button", className: "card", title: nameOf(row) },
    frame,
    element(
      "span",
      { className: "line" },
      element("bdi", { className: "name", textContent: baseName(row) }),
      element("span", { className: "value", textContent: column === null ? "" : scoreText(valueOf(column, row)) }),
    ),
    element("span", { className: "meter", "aria-hidden": "true" }, fill),
  );
  const item = element("li", { "aria-setsize": state.shown.length }, button);
  item.dataset.row = row;
  return item;
}

/** Put a card where its rank says. */
function placeCard(item, rank) {
  const x = (rank % gallery.across) * (gallery.width + GAP);
  const y = Math.floor(rank / gallery.across) * gallery.height;
  item.style.transform = `translate(${x}px, ${y}px)`;
  item.style.width = `${gallery.width}px`;
  item.style.height = `${gallery.height - GAP}px`;
  item.setAttribute("aria-posinset", rank + 1);
  item.setAttribute("aria-setsize", state.shown.length);
  item.dataset.rank = rank;
  item.firstChild.tabIndex = rank === gallery.current ? 0 : -1;
}

/** Make the cards near the window, and the one with the focus; remove all others. */
function showCards(anew = false) {
  const holder = byId("gallery");
  const list = byId("cards");
  if (!gallery.width) return;
  const focused = list.contains(document.activeElement) ? document.activeElement.parentElement : null;
  if (anew) {
    for (const item of gallery.cards.values()) if (item !== focused) item.remove();
    gallery.cards.clear();
    focused?.remove();
  }
  const top = -holder.getBoundingClientRect().top;
  const first = Math.max(0, Math.floor((top - AHEAD) / gallery.height)) * gallery.across;
  const last = Math.min(state.shown.length, Math.ceil((top + innerHeight + AHEAD) / gallery.height) * gallery.across);
  const wanted = new Set();
  for (let rank = first; rank < last; rank++) wanted.add(rank);
  if (gallery.current < state.shown.length) wanted.add(gallery.current); // there is always a way in by the Tab key
  for (const [rank, item] of gallery.cards) {
    if (wanted.has(rank)) continue;
    item.remove();
    gallery.cards.delete(rank);
  }
  let next = list.firstChild;
  for (const rank of [...wanted].sort((one, other) => one - other)) {
    let item = gallery.cards.get(rank);
    if (!item) {
      item = cardOf(state.shown[rank]);
      gallery.cards.set(rank, item);
    }
    placeCard(item, rank);
    if (item === next) next = next.nextSibling;
    else list.insertBefore(item, next);
  }
}

/** Move the focus to the card of a rank, wherever it is. */
function focusCard(rank) {
  if (!state.shown.length) return;
  gallery.current = clamp(rank, 0, state.shown.length - 1);
  showCards();
  const item = gallery.cards.get(gallery.current);
  item.firstChild.focus({ preventScroll: true });
  const box = item.getBoundingClientRect();
  const head = document.querySelector("#panel-images .toolbar").getBoundingClientRect().height + 12;
  if (box.top < head) scrollBy(0, box.top - head);
  else if (box.bottom > innerHeight) scrollBy(0, box.bottom - innerHeight + 12);
  showCards();
}

function onCardKey(event) {
  const steps = {
    ArrowRight: 1,
    ArrowLeft: -1,
    ArrowDown: gallery.across,
    ArrowUp: -gallery.across,
    PageDown: 3 * gallery.across,
    PageUp: -3 * gallery.across,
  };
  if (event.key in steps) focusCard(gallery.current + steps[event.key]);
  else if (event.key === "Home") focusCard(0);
  else if (event.key === "End") focusCard(state.shown.length - 1);
  else return;
  event.preventDefault();
}

function statusText() {
  const by = byId("sort").selectedOptions[0]?.textContent ?? "";
  const shown = state.shown.length === rowCount ? plural(rowCount, "image") : `${countText(state.shown.length)} of ${plural(rowCount, "image")}`;
  return `${shown}, ${by}: ${directionText().toLowerCase()}`;
}

function directionText() {
  if (state.sort === "name") return state.worstFirst ? "A to Z" : "Z to A";
  if (state.sort === "pixels") return state.worstFirst ? "Smallest first" : "Largest first";
  if (state.sort === "surprise") return state.worstFirst ? "Most unusual first" : "Most usual first";
  const about = columns[Number(state.sort)];
  if (about && about.more !== "better") return state.worstFirst !== about.lowerBetter ? "Lowest first" : "Highest first";
  return state.worstFirst ? "Worst first" : "Best first";
}

function showGallery() {
  const holder = byId("gallery");
  gallery.current = clamp(gallery.current, 0, Math.max(0, state.shown.length - 1));
  layOut();
  holder.style.height = `${Math.ceil(state.shown.length / gallery.across) * gallery.height}px`;
  byId("empty").hidden = state.shown.length > 0;
  byId("status").textContent = statusText();
  byId("direction").textContent = directionText();
  byId("reset").hidden = !isFiltered();
  for (const button of byId("views").children) {
    button.setAttribute("aria-pressed", String(button.dataset.view === state.view));
  }
  showCards(true);
}

function startGallery() {
  const sort = byId("sort");
  appendScores(sort);
  sort.append(element("option", { value: "name", textContent: "name" }));
  sort.append(element("option", { value: "pixels", textContent: "number of pixels" }));
  if (outliersOf.size) sort.append(element("option", { value: "surprise", textContent: "distance from the median" }));
  sort.addEventListener("change", () => {
    gallery.current = 0;
    change({ sort: sort.value });
  });
  byId("direction").addEventListener("click", () => {
    gallery.current = 0;
    change({ worstFirst: !state.worstFirst });
  });
  byId("search").addEventListener("input", (event) => change({ search: event.target.value.trim().toLowerCase() }));
  byId("reset").addEventListener("click", () => {
    byId("search").value = "";
    change({ search: "", view: "all", ranges: columns.map(() => null) });
    byId("search").focus();
  });
  for (const [name, view] of Object.entries(views)) {
    const many = name === "all" ? rowCount : [...data.paths.keys()].filter(view.has).length;
    if (!many) continue;
    const button = element("button", { type: "button", textContent: `${view.label} ${countText(many)}` });
    button.dataset.view = name;
    button.addEventListener("click", () => change({ view: name }));
    byId("views").append(button);
  }
  const list = byId("cards");
  list.addEventListener("keydown", onCardKey);
  list.addEventListener("focusin", (event) => {
    const rank = Number(event.target.closest("li").dataset.rank);
    if (rank === gallery.current) return;
    gallery.cards.get(gallery.current)?.firstChild.setAttribute("tabindex", -1);
    gallery.current = rank;
    event.target.tabIndex = 0;
  });
  list.addEventListener("click", (event) => {
    const item = event.target.closest("li");
    if (item) openPicture(Number(item.dataset.row));
  });
  let waitingForFrame = false;
  addEventListener(
    "scroll",
    () => {
      if (waitingForFrame) return;
      waitingForFrame = true;
      requestAnimationFrame(() => {
        waitingForFrame = false;
        showCards();
      });
    },
    { passive: true },
  );
  new ResizeObserver(() => {
    const before = gallery.width;
    layOut();
    if (gallery.width !== before) showGallery();
  }).observe(byId("gallery"));
  listeners.push(showGallery);
}

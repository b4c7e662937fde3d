// Two columns against each other: a scatter plot that filters, their rank correlation, and what moved most.

const MARGIN = { left: 52, right: 14, top: 12, bottom: 42 };
const MOVED = 12;
const scatter = { across: 0, up: 1, drag: null };

/** Ranks from 1; equal values share the mean of theirs. */
function ranks(values) {
  const order = [...values.keys()].sort((one, other) => values[one] - values[other]);
  const found = new Float64Array(values.length);
  for (let start = 0; start < order.length; ) {
    let end = start;
    while (end < order.length && values[order[end]] === values[order[start]]) end++;
    for (let at = start; at < end; at++) found[order[at]] = (start + end + 1) / 2;
    start = end;
  }
  return found;
}

function pearson(one, other) {
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const [middle, centre] = [mean(one), mean(other)];
  let [product, first, second] = [0, 0, 0];
  one.forEach((value, at) => {
    const [a, b] = [value - middle, other[at] - centre];
    product += a * b;
    first += a * a;
    second += b * b;
  });
  return first && second ? product / Math.sqrt(first * second) : null;
}

const rowsWithBoth = (rows, one, other) =>
  rows.filter((row) => valueOf(one, row) !== null && valueOf(other, row) !== null);

/** Spearman's correlation of two columns over these rows; null if it does not exist. */
function srcc(one, other, rows) {
  const both = rowsWithBoth(rows, one, other);
  if (both.length < 2) return null;
  return pearson(ranks(both.map((row) => valueOf(one, row))), ranks(both.map((row) => valueOf(other, row))));
}

/** The pair of runs [first, second, change] that the axes show, if they show one. */
const shownPair = () => data.pairs.find(([one, other]) => one === scatter.across && other === scatter.up);

/** How far a row has moved: the change of a score, or the shift of its rank from one metric to the other. */
function movement(row) {
  const pair = shownPair();
  if (pair) return valueOf(pair[2], row);
  const [one, other] = [betterThan(scatter.across, row), betterThan(scatter.up, row)];
  return one === null || other === null ? null : other - one;
}

function showMoved() {
  const pair = shownPair();
  const moved = rowsWithBoth(state.shown, scatter.across, scatter.up)
    .map((row) => [row, movement(row)])
    .filter(([, by]) => by !== null && Math.abs(by) > 1e-9)
    .sort((one, other) => Math.abs(other[1]) - Math.abs(one[1]) || one[0] - other[0]);
  const [across, up] = [columns[scatter.across], columns[scatter.up]];
  byId("moved-heading").textContent = pair ? "What moved most" : "Where they differ most";
  byId("moved-words").textContent = !moved.length
    ? "No difference."
    : pair
      ? `Largest changes of the score, from ${data.runs[0]} to ${data.runs[1]}.`
      : `Largest shifts of rank, from ${across.label} to ${up.label}, in percent of the table.`;
  byId("moved").replaceChildren(
    ...moved.slice(0, MOVED).map(([row, by]) => {
      const higher = pair && up.lowerBetter ? by < 0 : by > 0;
      const meaning = higher ? up.more : up.less;
      const words = pair ? signedText(by) : `${by > 0 ? "+" : "−"}${Math.abs(100 * by).toFixed(0)} %`;
      const from = `${scoreText(valueOf(scatter.across, row))} → ${scoreText(valueOf(scatter.up, row))}${pair ? ` · ${meaning}` : ""}`;
      // What describes an image, such as its brightness, has a word for each side and no colour.
      const judged = up.more === "better" && across.more === "better" ? ` ${meaning}` : "";
      const label = element("span", { className: `by${judged}`, textContent: words });
      return element("li", {}, pictureButton(row, label, element("div", { className: "from", textContent: from })));
    }),
  );
}

function showCorrelation() {
  const both = rowsWithBoth(state.shown, scatter.across, scatter.up);
  const found = srcc(scatter.across, scatter.up, state.shown);
  const words = found === null ? "not defined" : found.toFixed(3).replace("-", "−");
  byId("srcc").replaceChildren("SRCC ", element("b", { textContent: words }), ` of ${plural(both.length, "image")}`);
  byId("scatter").setAttribute(
    "aria-label",
    `Scatter plot of ${columns[scatter.up].shown} against ${columns[scatter.across].shown}, ` +
      `${plural(both.length, "image")}, SRCC ${words}`,
  );
}

/** The plot's scales, from values to pixels of its canvas and back. */
function axes() {
  const canvas = byId("scatter");
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  let [x, y] = [domainOf(scatter.across), domainOf(scatter.up)];
  if (shownPair()) x = y = [Math.min(x[0], y[0]), Math.max(x[1], y[1])]; // equal scores on the diagonal
  const pad = (domain) => [domain[0] - 0.03 * (domain[1] - domain[0]), domain[1] + 0.03 * (domain[1] - domain[0])];
  [x, y] = [pad(x), pad(y)];
  const inner = [width - MARGIN.left - MARGIN.right, height - MARGIN.top - MARGIN.bottom];
  return {
    width,
    height,
    x,
    y,
    left: (value) => MARGIN.left + (inner[0] * (value - x[0])) / (x[1] - x[0]),
    top: (value) => MARGIN.top + inner[1] * (1 - (value - y[0]) / (y[1] - y[0])),
    across: (left) => x[0] + ((x[1] - x[0]) * (left - MARGIN.left)) / inner[0],
    up: (top) => y[0] + (y[1] - y[0]) * (1 - (top - MARGIN.top) / inner[1]),
  };
}

function ticks(domain) {
  const rough = (domain[1] - domain[0]) / 6;
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].find((each) => each * power >= rough) * power;
  const found = [];
  for (let at = Math.ceil(domain[0] / size); at * size <= domain[1]; at++) found.push(at * size);
  return { found, digits: Math.max(0, -Math.floor(Math.log10(size))) };
}

function drawScatter() {
  const canvas = byId("scatter");
  if (!canvas.clientWidth) return;
  const scale = axes();
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(scale.width * ratio);
  canvas.height = Math.round(scale.height * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  drawGrid(pen, scale);
  if (shownPair()) {
    pen.strokeStyle = colour("quiet");
    pen.setLineDash([4, 4]);
    pen.beginPath();
    pen.moveTo(scale.left(scale.x[0]), scale.top(scale.y[0]));
    pen.lineTo(scale.left(scale.x[1]), scale.top(scale.y[1]));
    pen.stroke();
    pen.setLineDash([]);
  }
  const size = rowCount > 5000 ? 1.5 : rowCount > 500 ? 2.5 : 4.5;
  const dot = (row) => {
    pen.beginPath();
    pen.arc(scale.left(valueOf(scatter.across, row)), scale.top(valueOf(scatter.up, row)), size, 0, 2 * Math.PI);
    pen.fill();
  };
  pen.fillStyle = colour("accent-soft");
  rowsWithBoth([...data.paths.keys()], scatter.across, scatter.up).forEach(dot);
  pen.fillStyle = colour("accent");
  pen.globalAlpha = rowCount > 500 ? 0.6 : 0.85;
  rowsWithBoth(state.shown, scatter.across, scatter.up).forEach(dot);
  pen.globalAlpha = 1;
  drawBrush(pen, scale);
}

function drawGrid(pen, scale) {
  pen.strokeStyle = colour("line");
  pen.fillStyle = colour("quiet");
  pen.lineWidth = 1;
  const [bottom, right] = [scale.height - MARGIN.bottom, scale.width - MARGIN.right];
  const line = (...points) => {
    pen.beginPath();
    pen.moveTo(points[0], points[1]);
    pen.lineTo(points[2], points[3]);
    pen.stroke();
  };
  const x = ticks(scale.x);
  pen.textAlign = "center";
  for (const value of x.found) {
    line(scale.left(value), MARGIN.top, scale.left(value), bottom);
    pen.fillText(value.toFixed(x.digits), scale.left(value), bottom + 16);
  }
  const y = ticks(scale.y);
  pen.textAlign = "right";
  for (const value of y.found) {
    line(MARGIN.left, scale.top(value), right, scale.top(value));
    pen.fillText(value.toFixed(y.digits), MARGIN.left - 8, scale.top(value) + 4);
  }
  pen.fillStyle = colour("ink");
  pen.textAlign = "center";
  pen.fillText(columns[scatter.across].label, (MARGIN.left + right) / 2, scale.height - 6, right - MARGIN.left);
  pen.save();
  pen.translate(12, (MARGIN.top + bottom) / 2);
  pen.rotate(-Math.PI / 2);
  pen.fillText(columns[scatter.up].label, 0, 0, bottom - MARGIN.top);
  pen.restore();
}

function drawBrush(pen, scale) {
  const [x, y] = [state.ranges[scatter.across], state.ranges[scatter.up]];
  if (!x && !y) return;
  const edge = (range, domain) => [Math.max(range?.[0] ?? -Infinity, domain[0]), Math.min(range?.[1] ?? Infinity, domain[1])];
  const [[left, right], [low, high]] = [edge(x, scale.x), edge(y, scale.y)];
  pen.strokeStyle = colour("warn");
  pen.lineWidth = 1.5;
  pen.strokeRect(scale.left(left), scale.top(high), scale.left(right) - scale.left(left), scale.top(low) - scale.top(high));
}

function nearest(place) {
  const scale = axes();
  let [best, least] = [null, 12 ** 2];
  for (const row of rowsWithBoth(state.shown, scatter.across, scatter.up)) {
    const distance =
      (scale.left(valueOf(scatter.across, row)) - place[0]) ** 2 + (scale.top(valueOf(scatter.up, row)) - place[1]) ** 2;
    if (distance < least) [best, least] = [row, distance];
  }
  return best;
}

function startBrush(canvas) {
  const placeOf = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const far = (one, other) => Math.hypot(one[0] - other[0], one[1] - other[1]) > 4;
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    scatter.drag = placeOf(event);
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const place = placeOf(event);
    if (!scatter.drag) {
      const row = nearest(place);
      canvas.title = row === null ? "" : nameOf(row);
    } else if (far(place, scatter.drag)) {
      const scale = axes();
      const between = (of, one, other) => [Math.min(of(one), of(other)), Math.max(of(one), of(other))];
      state.ranges[scatter.across] = between(scale.across, scatter.drag[0], place[0]);
      state.ranges[scatter.up] = between(scale.up, scatter.drag[1], place[1]);
      change({});
    }
  });
  canvas.addEventListener("pointerup", (event) => {
    const place = placeOf(event);
    if (scatter.drag && !far(place, scatter.drag)) {
      const row = nearest(place);
      if (row !== null) openPicture(row);
      else {
        state.ranges[scatter.across] = state.ranges[scatter.up] = null;
        change({});
      }
    }
    scatter.drag = null;
  });
  canvas.addEventListener("pointercancel", () => {
    scatter.drag = null;
  });
}

function showCompare() {
  if (byId("panel-compare").hidden) return;
  showCorrelation();
  showMoved();
  drawScatter();
}

function startScatter() {
  if (!byId("panel-compare")) return;
  [scatter.across, scatter.up] = data.pairs[0] ?? [0, 1];
  for (const axis of ["across", "up"]) {
    const select = byId(axis);
    appendScores(select);
    select.value = scatter[axis];
    select.addEventListener("change", () => {
      scatter[axis] = Number(select.value);
      showCompare();
    });
  }
  startBrush(byId("scatter"));
  new ResizeObserver(showCompare).observe(byId("scatter"));
  themeListeners.push(showCompare);
  listeners.push(showCompare);
}

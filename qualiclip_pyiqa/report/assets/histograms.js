// A chart of each score: all images in the background, those that pass the filters in front.

const CHARTS_AT_FIRST = data.pairs.length ? 3 : 8; // of two runs, those of the first score

/** Ends of a column's axis: of its scores; where all are equal, of the score's range, or some way around if unknown. */
function domainOf(column) {
  const numbers = sorted(column);
  if (!numbers.length) return [0, 1];
  const [low, high] = [numbers[0], numbers[numbers.length - 1]];
  if (low < high) return [low, high];
  const { limits } = columns[column];
  return limits && limits[0] <= low && low <= limits[1] ? limits : [low - 0.5, high + 0.5];
}

function binner(column, domain, bins) {
  return (value) => Math.min(bins - 1, Math.floor((bins * (value - domain[0])) / (domain[1] - domain[0])));
}

/** Whether the columns are of several metrics, so that attributes alone would not say which. */
const hasGroups = new Set(columns.map(({ group }) => group)).size > 1;

function histogram(column) {
  const about = columns[column];
  const domain = domainOf(column);
  const bins = clamp(Math.round(2 * Math.sqrt(sorted(column).length)), 12, columns.length === 1 ? 80 : 40);
  const binOf = binner(column, domain, bins);
  const count = (rows) => {
    const counts = new Array(bins).fill(0);
    for (const row of rows) if (valueOf(column, row) !== null) counts[binOf(valueOf(column, row))]++;
    return counts;
  };
  const total = count(data.paths.keys());
  const most = Math.max(1, ...total);
  const picture = drawn("svg", { viewBox: `0 0 ${bins} 100`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const bar = (kind, bin) => {
    const made = drawn("rect", { class: kind, x: bin + 0.06, width: 0.88, y: 100, height: 0 });
    picture.append(made);
    return made;
  };
  const back = total.map((_, bin) => bar("all", bin));
  const front = total.map((_, bin) => bar("kept", bin));
  const size = (rect, number) => {
    const height = number ? Math.max(2.5, (100 * number) / most) : 0;
    rect.setAttribute("y", 100 - height);
    rect.setAttribute("height", height);
  };
  total.forEach((number, bin) => size(back[bin], number));

  const handles = rangeHandles(column, domain);
  const chart = element("div", { className: "chart" }, picture);
  onDrag(chart, handles.chooseShares, () => setRange(column, null));
  const known = sorted(column).length;
  const clear = element("button", { type: "button", textContent: "clear", "aria-label": `Clear the range of ${about.shown}`, hidden: true });
  clear.addEventListener("click", () => setRange(column, null));
  const ends = [element("span"), element("span")];
  const card = element(
    "article",
    { className: "histogram" },
    element(
      "h3",
      {},
      // The metric in a line of its own: a narrow chart has no room for both, and the end is what tells charts apart.
      hasGroups ? element("bdi", { className: "group", textContent: about.group || "\u00a0" }) : "",
      element("bdi", { textContent: hasGroups ? about.option : about.label, title: about.shown }),
    ),
    element(
      "p",
      { className: "sub" },
      element("span", { textContent: `${about.lowerBetter ? "lower" : "higher"} is ${about.more}` }),
      element("span", { textContent: known ? `median ${scoreText(quantile(column, 0.5))}` : "no scores" }),
    ),
    chart,
    handles.node,
    element("div", { className: "ends" }, ends[0], clear, ends[1]),
  );
  const show = () => {
    const range = state.ranges[column];
    count(state.shown).forEach((number, bin) => size(front[bin], number));
    card.classList.toggle("filtered", range !== null);
    clear.hidden = range === null;
    ends[0].textContent = scoreText(range ? Math.max(range[0], domain[0]) : domain[0]);
    ends[1].textContent = scoreText(range ? Math.min(range[1], domain[1]) : domain[1]);
    handles.update();
  };
  return { card, show };
}

function startHistograms() {
  const holder = byId("histograms");
  const more = byId("more-scores");
  const charts = columns.map((_, column) => histogram(column));
  holder.classList.toggle("one", charts.length === 1);
  holder.append(...charts.map((chart) => chart.card));
  const fold = (folded) => {
    charts.forEach((chart, index) => {
      chart.card.hidden = folded && index >= CHARTS_AT_FIRST;
    });
    more.textContent = folded ? `Show all ${charts.length} scores` : "Show fewer scores";
    more.setAttribute("aria-expanded", String(!folded));
  };
  more.hidden = charts.length <= CHARTS_AT_FIRST;
  if (!more.hidden) {
    let folded = true;
    more.addEventListener("click", () => fold((folded = !folded)));
    fold(true);
  }
  listeners.push(() => charts.forEach((chart) => chart.show()));
}

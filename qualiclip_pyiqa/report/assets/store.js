// The table, what is chosen of it, and who has to know when that changes.

const data = JSON.parse(byId("data").textContent);
const columns = data.columns;
const rowCount = data.paths.length;

const state = {
  sort: "0", // index of a column, or "name", "pixels", "surprise"
  worstFirst: true,
  view: "all", // or "outliers", "duplicates", "unscored"
  search: "",
  ranges: columns.map(() => null), // [low, high] or null
  shown: [], // rows that pass, in order
};
const listeners = [];

const nameOf = (row) => data.names[row] ?? data.paths[row];
const baseName = (row) => nameOf(row).split("/").pop();
const valueOf = (column, row) => data.values[column][row];

/** Outlying columns of each row: row -> [[column, z], ...]. */
const outliersOf = new Map();
data.outliers.forEach((found, column) => {
  for (const [row, z] of Object.entries(found)) {
    const list = outliersOf.get(Number(row)) ?? [];
    list.push([column, z]);
    outliersOf.set(Number(row), list);
  }
});

/** Group of near-duplicates of each row: row -> [rows]. */
const duplicatesOf = new Map();
for (const group of data.duplicates) for (const row of group) duplicatesOf.set(row, group);

/** Append the scores to a menu, those of a metric's attributes as a group. */
function appendScores(select) {
  const groups = new Map();
  columns.forEach(({ group, option }, index) => {
    if (group && !groups.has(group)) {
      groups.set(group, element("optgroup", { label: group }));
      select.append(groups.get(group));
    }
    (groups.get(group) ?? select).append(element("option", { value: index, textContent: option }));
  });
}

const firstColumn = columns.length ? 0 : null;
const isUnscored = (row) => row in data.errors || valueOf(0, row) === null;

const views = {
  all: { label: "All", has: () => true },
  outliers: { label: "Outliers", has: (row) => outliersOf.has(row) },
  duplicates: { label: "Near-duplicates", has: (row) => duplicatesOf.has(row) },
  unscored: { label: "No score", has: isUnscored },
};

const sortedValues = columns.map(() => null);

/** A column's scores in ascending order. */
function sorted(column) {
  sortedValues[column] ??= Float64Array.from(data.values[column].filter((value) => value !== null)).sort();
  return sortedValues[column];
}

/** How many numbers of an ascending array are below a value, or equal to it if these count too. */
function countBelow(numbers, value, orEqual = false) {
  let low = 0;
  let high = numbers.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (numbers[middle] < value || (orEqual && numbers[middle] === value)) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Share of the other images with a worse score, 0..1, equal ones counted half; null for a missing score or a single image. */
function betterThan(column, row) {
  const value = valueOf(column, row);
  const numbers = sorted(column);
  if (value === null || numbers.length < 2) return null;
  const below = countBelow(numbers, value);
  const above = numbers.length - countBelow(numbers, value, true);
  const equal = numbers.length - below - above - 1; // but for the image itself
  return ((columns[column].lowerBetter ? above : below) + equal / 2) / (numbers.length - 1);
}

/** Where a row is among the others, in words. */
function rankText(column, row) {
  const share = betterThan(column, row);
  if (share === null) return "no rank";
  const numbers = sorted(column);
  if (numbers[0] === numbers[numbers.length - 1]) return "equal to all others";
  return `${columns[column].more} than ${Math.round(100 * share)} % of the others`;
}

function quantile(column, share) {
  const numbers = sorted(column);
  const at = share * (numbers.length - 1);
  const low = Math.floor(at);
  return numbers[low] + (at - low) * (numbers[Math.min(low + 1, numbers.length - 1)] - numbers[low]);
}

/** Whether a row passes the filters, but for the range of one column. */
function passes(row, but = -1) {
  if (!views[state.view].has(row)) return false;
  if (state.search && !nameOf(row).toLowerCase().includes(state.search)) return false;
  return state.ranges.every((range, column) => {
    if (range === null || column === but) return true;
    const value = valueOf(column, row);
    return value !== null && value >= range[0] && value <= range[1];
  });
}

/** What rows are ordered by: a number (or text) that is small for what comes first; null comes last. */
function sortKey() {
  const direction = state.worstFirst ? 1 : -1;
  if (state.sort === "name") return null;
  if (state.sort === "pixels") return (row) => direction * data.sizes[row][0] * data.sizes[row][1];
  if (state.sort === "surprise") {
    return (row) => -direction * Math.max(0, ...(outliersOf.get(row) ?? []).map(([, z]) => Math.abs(z)));
  }
  const column = Number(state.sort);
  const sign = direction * (columns[column].lowerBetter ? -1 : 1);
  return (row) => (valueOf(column, row) === null ? null : sign * valueOf(column, row));
}

function ordered(rows) {
  const key = sortKey();
  if (key === null) {
    const words = new Intl.Collator("en", { numeric: true });
    rows.sort((one, other) => words.compare(nameOf(one), nameOf(other)) || one - other);
    return state.worstFirst ? rows : rows.reverse();
  }
  const keys = new Float64Array(rowCount);
  for (const row of rows) keys[row] = key(row) ?? Infinity;
  rows.sort((one, other) => keys[one] - keys[other] || one - other);
  if (state.view !== "duplicates") return rows;
  // Groups stay together, each where its first image is.
  return [...new Set(rows.flatMap((row) => duplicatesOf.get(row)))].filter((row) => passes(row));
}

function update() {
  const rows = [];
  for (let row = 0; row < rowCount; row++) if (passes(row)) rows.push(row);
  state.shown = ordered(rows);
  for (const listener of listeners) listener();
}

let queued = false;

/** Update before the next frame, however often it is asked for. */
function change(changes) {
  Object.assign(state, changes);
  if (queued) return;
  queued = true;
  requestAnimationFrame(() => {
    queued = false;
    update();
  });
}

function setRange(column, range) {
  state.ranges[column] = range;
  change({});
}

const isFiltered = () => state.search !== "" || state.view !== "all" || state.ranges.some((range) => range !== null);

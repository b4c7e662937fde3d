// The table as a CSV file. Bytes of names that are not UTF-8 are written as they were.

function cellText(value) {
  if (value === null || value === undefined) return "";
  const text = String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** Encode as UTF-8; a lone low surrogate U+DC80 to U+DCFF stands for one byte. */
function bytesOf(text) {
  const encoder = new TextEncoder();
  const parts = text.split(/([\udc80-\udcff])/).reduce((pieces, part) => {
    const last = pieces[pieces.length - 1];
    const escape = part.length === 1 && part >= "\udc80" && part <= "\udcff";
    // The second half of a pair belongs to the character before it.
    if (escape && /[\ud800-\udbff]$/.test(last ?? "")) pieces[pieces.length - 1] = last + part;
    else if (pieces.joined && !escape) pieces[pieces.length - 1] = last + part;
    else pieces.push(part);
    pieces.joined = escape && pieces[pieces.length - 1].length > 1;
    return pieces;
  }, []);
  return parts.map((part) =>
    /^[\udc80-\udcff]$/.test(part) ? Uint8Array.of(part.charCodeAt(0) - 0xdc00) : encoder.encode(part),
  );
}

function tableText(rows) {
  const header = ["path", "width", "height", ...columns.map((column) => column.name), "error"];
  const lines = rows.map((row) => [
    data.folder + data.paths[row],
    ...data.sizes[row].map((side) => side || null),
    ...columns.map((_, column) => valueOf(column, row)),
    data.errors[row],
  ]);
  return [header, ...lines].map((cells) => `${cells.map(cellText).join(",")}\n`).join("");
}

function startDownload() {
  const button = byId("download");
  listeners.push(() => {
    button.textContent = isFiltered() ? `Download CSV of ${countText(state.shown.length)}` : "Download CSV";
  });
  button.addEventListener("click", () => {
    const rows = isFiltered() ? [...state.shown].sort((one, other) => one - other) : [...data.paths.keys()];
    const address = URL.createObjectURL(new Blob(bytesOf(tableText(rows)), { type: "text/csv" }));
    element("a", { href: address, download: "scores.csv" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  });
}

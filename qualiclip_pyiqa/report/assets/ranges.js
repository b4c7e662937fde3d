// Two handles on a chart's axis. They are native range inputs: keys, touch and screen readers come with them.

const STEPS = 200;

/** Create the handles of a column; `domain` is its [low, high]. */
function rangeHandles(column, domain) {
  const at = (step) => domain[0] + ((domain[1] - domain[0]) * step) / STEPS;
  const stepOf = (value) => clamp(Math.round((STEPS * (value - domain[0])) / (domain[1] - domain[0])), 0, STEPS);
  const span = element("span", { className: "span" });
  const inputs = ["lowest", "highest"].map((which, index) =>
    element("input", {
      type: "range",
      min: 0,
      max: STEPS,
      value: index * STEPS,
      "aria-label": `${which} ${columns[column].shown}`,
      "aria-describedby": "brush-help",
    }),
  );
  const show = (low, high) => {
    inputs[0].value = low;
    inputs[1].value = high;
    // The handle that can move further lies on top, so that two at one end do not lock each other.
    inputs[0].style.zIndex = low > STEPS / 2 ? 2 : 1;
    inputs[1].style.zIndex = low > STEPS / 2 ? 1 : 2;
    inputs[0].setAttribute("aria-valuetext", scoreText(at(low)));
    inputs[1].setAttribute("aria-valuetext", scoreText(at(high)));
    span.style.left = `calc(9px + (100% - 18px) * ${low / STEPS})`;
    span.style.width = `calc((100% - 18px) * ${(high - low) / STEPS})`;
  };
  const choose = (low, high) => {
    // The ends are open: rounding must not drop the lowest and the highest.
    const range = [low <= 0 ? -Infinity : at(low), high >= STEPS ? Infinity : at(high)];
    setRange(column, low <= 0 && high >= STEPS ? null : range);
  };
  inputs[0].addEventListener("input", () => {
    const low = Math.min(Number(inputs[0].value), Number(inputs[1].value));
    show(low, Number(inputs[1].value));
    choose(low, Number(inputs[1].value));
  });
  inputs[1].addEventListener("input", () => {
    const high = Math.max(Number(inputs[0].value), Number(inputs[1].value));
    show(Number(inputs[0].value), high);
    choose(Number(inputs[0].value), high);
  });
  show(0, STEPS);
  return {
    node: element("div", { className: "handles" }, span, ...inputs),
    /** Choose by shares of the axis, 0..1. */
    chooseShares: (one, other) =>
      choose(Math.round(STEPS * Math.min(one, other)), Math.round(STEPS * Math.max(one, other))),
    update() {
      const range = state.ranges[column];
      show(range ? stepOf(range[0]) : 0, range ? stepOf(range[1]) : STEPS);
    },
  };
}

/** Call `choose(from, to)` with shares of an element's width while a pointer is dragged over it, `clear` for a click. */
function onDrag(node, choose, clear) {
  let from = null;
  const share = (event) => {
    const box = node.getBoundingClientRect();
    return clamp((event.clientX - box.left) / box.width, 0, 1);
  };
  node.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    from = { x: event.clientX, share: share(event) };
    node.setPointerCapture(event.pointerId);
  });
  node.addEventListener("pointermove", (event) => {
    if (from && Math.abs(event.clientX - from.x) > 3) choose(from.share, share(event));
  });
  node.addEventListener("pointerup", (event) => {
    if (from && Math.abs(event.clientX - from.x) <= 3) clear();
    from = null;
  });
  node.addEventListener("pointercancel", () => {
    from = null;
  });
}

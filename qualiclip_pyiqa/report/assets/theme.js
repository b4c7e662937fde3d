// Light or dark: as the system says, until the button is used; the choice is kept where the browser allows it.

const themeListeners = [];

function startTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const button = byId("theme");
  let chosen = null;
  try {
    chosen = localStorage.getItem("qualiclip-report-theme");
  } catch {
    // A page in a file may have no storage.
  }
  const isDark = () => (chosen ? chosen === "dark" : system.matches);
  const show = () => {
    if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
    button.setAttribute("aria-pressed", String(isDark()));
    button.title = isDark() ? "Light theme" : "Dark theme";
    for (const listener of themeListeners) listener();
  };
  button.addEventListener("click", () => {
    chosen = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("qualiclip-report-theme", chosen);
    } catch {
      // Then the choice lasts as long as the page is open.
    }
    show();
  });
  system.addEventListener("change", show);
  show();
}

/** The value of a variable, as it is written. */
const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** A colour of the current theme, for a canvas, which knows no light-dark(). */
function colour(name) {
  const probe = byId("theme");
  probe.style.outlineColor = `var(--${name})`;
  const found = getComputedStyle(probe).outlineColor;
  probe.style.outlineColor = "";
  return found;
}

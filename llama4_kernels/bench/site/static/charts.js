"use strict";
// What all charts share: colours of the theme, layout, and drawing when a chart comes into view.

const PALETTE = ["#2386c9", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bb1", "#7f7f7f", "#b8860b", "#4c9a2a"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const MARK = { symbol: "x", size: 10, color: "#d62728" };
const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function merged(base, more) {
  const result = { ...base };
  for (const [key, value] of Object.entries(more)) {
    const nested = value && typeof value === "object" && !Array.isArray(value) && base[key];
    result[key] = nested ? merged(base[key], value) : value;
  }
  return result;
}

function layout(more) {
  const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true };
  return merged(
    {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: css("--text"), size: 12, family: css("--font") },
      margin: { l: 52, r: 12, t: 8, b: 30 },
      hovermode: "closest",
      hoverlabel: { align: "left" },
      xaxis: { ...axis },
      yaxis: { ...axis },
      legend: { orientation: "h", y: -0.14, yanchor: "top", x: 0, font: { size: 11 } },
    },
    more,
  );
}

// Charts are drawn when they come near the window, so that a page of many appears at once.
const drawers = new Map();
const observer = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) if (entry.isIntersecting) draw(entry.target);
  },
  { rootMargin: "200px" },
);

// Plotly's large script comes last, so that tables and filters need not wait for it.
const waiting = new Set();
document.getElementById("plotly").addEventListener("load", () => waiting.forEach(draw));

function draw(element) {
  const drawer = drawers.get(element);
  if (!drawer) return;
  if (!window.Plotly) {
    waiting.add(element);
    return;
  }
  observer.unobserve(element);
  const { traces, layout: wanted, empty } = drawer();
  element.classList.toggle("none", traces.length === 0);
  if (traces.length === 0) {
    Plotly.purge(element);
    element.textContent = empty;
  } else {
    if (!element.classList.contains("js-plotly-plot")) element.textContent = "";
    Plotly.react(element, traces, layout(wanted), CONFIG);
  }
  element.dataset.drawn = traces.length;
}

function chart(element, drawer) {
  drawers.set(element, drawer);
  delete element.dataset.drawn;
  observer.unobserve(element);
  observer.observe(element);
}

document.addEventListener("themechange", () => {
  for (const element of drawers.keys()) if (element.dataset.drawn !== undefined) draw(element);
});

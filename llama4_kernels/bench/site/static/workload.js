"use strict";
const historyChart = document.getElementById("history");
if (historyChart) {
  chart(historyChart, () => {
    const traces = Object.entries(window.HISTORY).map(([name, points], i) => ({
      name,
      x: points.map((p) => p.date),
      y: points.map((p) => p.us),
      text: points.map((p) => `${p.commit}${p.verdict ? ", " + p.verdict : ""}`),
      mode: "lines+markers",
      line: { color: PALETTE[i % PALETTE.length] },
      hovertemplate: "%{y:.4g} µs<br>%{text}<extra>%{fullData.name}</extra>",
      marker: {
        symbol: points.map((p) => (p.regression ? MARK.symbol : "circle")),
        size: points.map((p) => (p.regression ? MARK.size : 7)),
        color: points.map((p) => (p.regression ? MARK.color : PALETTE[i % PALETTE.length])),
      },
    }));
    return {
      traces,
      layout: { yaxis: { title: { text: "µs" }, rangemode: "tozero" }, xaxis: { type: "date" }, showlegend: true },
      empty: "",
    };
  });
}

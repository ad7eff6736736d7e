"use strict";
// The first page: filters, charts of each op, roofline and table, from window.RESULTS (see site/data.py: for_script).

const R = window.RESULTS;
const W = R.workloads.map(([name, op, model, dtype, tp, series, x, href, intensity]) => ({
  name,
  op,
  model,
  dtype,
  tp,
  series,
  x,
  href,
  intensity,
}));
const IMPLEMENTATIONS = R.implementations.map(([name, peer]) => ({ name, peer, label: peer ? `peer ${name}` : name }));
const ROWS = R.rows.map((row) => {
  const [w, i, device, run, status, newest, median, p10, p90, floor, gb, tflop, verdict, ratio] = row;
  return {
    w: W[w],
    by: IMPLEMENTATIONS[i],
    color: PALETTE[i % PALETTE.length],
    device: R.devices[device],
    run,
    status: R.statuses[status],
    newest: newest === 1,
    median,
    p10,
    p90,
    floor,
    gb,
    tflop,
    verdict,
    ratio,
  };
});
const TABLE_ROWS = 100;
const form = document.getElementById("filters");
const state = { sort: null, descending: false, all: false };

// ---------------------------------------------------------------- filters

const distinct = (values) => [...new Set(values)];
const FIELDS = {
  device: { of: (r) => r.device, values: R.devices, first: R.devices[0] },
  model: { of: (r) => r.w.model, values: distinct(W.map((w) => w.model)), first: "scout" },
  tp: {
    of: (r) => String(r.w.tp),
    values: distinct(W.map((w) => w.tp))
      .sort((a, b) => a - b)
      .map(String),
    first: "8",
  },
  dtype: { of: (r) => r.w.dtype, values: distinct(W.map((w) => w.dtype)), first: null },
  implementation: { of: (r) => r.by.label, values: IMPLEMENTATIONS.map((i) => i.label), first: null },
  op: { of: (r) => r.w.op, values: R.ops, first: null },
};

function fillFilters() {
  const asked = new URLSearchParams(location.hash.slice(1));
  for (const [name, field] of Object.entries(FIELDS)) {
    const select = form.elements[name];
    const options = name === "device" ? field.values : ["all", ...field.values];
    select.replaceChildren(...options.map((value) => new Option(value, value)));
    const wanted = asked.get(name) ?? field.first;
    const start = options.includes(wanted) ? wanted : options[0];
    for (const option of select.options) option.defaultSelected = option.value === start;
    select.value = start;
  }
}

function chosen(except = []) {
  const wanted = Object.entries(FIELDS).filter(([name]) => !except.includes(name) && form.elements[name].value !== "all");
  return ROWS.filter((row) => wanted.every(([name, field]) => field.of(row) === form.elements[name].value));
}

// ---------------------------------------------------------------- series

// Rows by what makes a line, in the order of x; only what the filters leave open goes into its name.
function lines(rows, nameOf) {
  const open = ["model", "dtype", "tp"].filter((name) => form.elements[name].value === "all");
  const groups = new Map();
  for (const row of rows) {
    const rest = [...open.map((name) => (name === "tp" ? `tp${row.w.tp}` : row.w[name])), row.w.series].filter(Boolean).join(" ");
    const name = [nameOf(row), rest].filter(Boolean).join(" · ");
    if (!groups.has(name)) groups.set(name, { name, rest, rows: [] });
    groups.get(name).rows.push(row);
  }
  const rests = distinct([...groups.values()].map((group) => group.rest));
  for (const group of groups.values()) {
    group.rows.sort((a, b) => a.w.x - b.w.x);
    group.dash = DASHES[rests.indexOf(group.rest) % DASHES.length];
  }
  return [...groups.values()];
}

// Powers of two by their usual names: 64, 1k, 256k, 1M
const short = (x) => (x >= 1 << 20 ? `${x / (1 << 20)}M` : x >= 1024 ? `${x / 1024}k` : `${x}`);

function xAxis(rows) {
  const values = distinct(rows.map((row) => row.w.x)).sort((a, b) => a - b);
  const ticks = [];
  for (let x = 1; values.length && x <= values[values.length - 1]; x *= 4) if (x >= values[0] / 2) ticks.push(x);
  return { type: "log", tickmode: "array", tickvals: ticks, ticktext: ticks.map(short), tickangle: 0 };
}

function floorChart(op, rows) {
  const measured = rows.filter((row) => row.newest && row.status === "ok" && row.floor !== null);
  const traces = lines(measured, (row) => row.by.label).map((group) => ({
    name: group.name,
    x: group.rows.map((r) => r.w.x),
    y: group.rows.map((r) => r.floor),
    mode: "lines+markers",
    line: { color: group.rows[0].color, dash: group.dash },
    customdata: group.rows.map((r) => [r.w.name, r.median]),
    hovertemplate: "%{customdata[0]}<br>%{y:.3f} of the floor, %{customdata[1]:.4g} µs<extra>%{fullData.name}</extra>",
  }));
  return { traces, layout: { xaxis: xAxis(measured), yaxis: { rangemode: "tozero" }, showlegend: true }, empty: "No figure." };
}

// Our fastest newest result of each workload, and the peers of the same run: another run's clocks are not the same.
function peersChart(op, rows) {
  const best = new Map();
  const measured = rows.filter((row) => row.status === "ok" && row.median !== null);
  for (const row of measured) {
    if (row.newest && !row.by.peer && !(best.get(row.w.name)?.median <= row.median)) best.set(row.w.name, row);
  }
  const peers = measured.filter((row) => row.by.peer && row.run === best.get(row.w.name)?.run);
  const traces = lines(peers, (row) => row.by.name).map((group) => ({
    name: group.name,
    x: group.rows.map((r) => r.w.x),
    y: group.rows.map((r) => r.median / best.get(r.w.name).median),
    mode: "lines+markers",
    line: { color: group.rows[0].color, dash: group.dash },
    customdata: group.rows.map((r) => [r.w.name, r.median, best.get(r.w.name).by.name, best.get(r.w.name).median]),
    hovertemplate:
      "%{customdata[0]}<br>%{fullData.name} %{customdata[1]:.4g} µs, ours (%{customdata[2]}) %{customdata[3]:.4g} µs<extra>%{y:.2f}×</extra>",
  }));
  const one = { type: "line", xref: "paper", x0: 0, x1: 1, y0: 1, y1: 1, line: { color: css("--muted"), width: 1, dash: "dot" } };
  return {
    traces,
    layout: { xaxis: xAxis(peers), yaxis: { rangemode: "tozero" }, shapes: [one], showlegend: true },
    empty: "No peer was measured in the same run.",
  };
}

// Of each backend, the geometric mean of time / time in the first run, over its workloads; and every regressed workload as a mark.
function historyChart(op, rows) {
  const ours = rows.filter((row) => row.status === "ok" && row.median !== null);
  const first = new Map();
  const keyOf = (row) => `${row.w.name} ${row.by.label}`;
  for (const row of [...ours].sort((a, b) => a.run - b.run)) if (!first.has(keyOf(row))) first.set(keyOf(row), row.median);
  const label = (run) => `${R.runs[run][0].slice(0, 10)} ${R.runs[run][1]}`;
  const traces = [];
  for (const by of distinct(ours.map((row) => row.by))) {
    const mine = ours.filter((row) => row.by === by);
    const runs = distinct(mine.map((row) => row.run)).sort((a, b) => a - b);
    const mean = (values) => Math.exp(values.reduce((sum, value) => sum + Math.log(value), 0) / values.length);
    const points = runs.map((run) => mine.filter((row) => row.run === run).map((row) => row.median / first.get(keyOf(row))));
    traces.push({
      name: by.label,
      x: runs.map(label),
      y: points.map(mean),
      mode: "lines+markers",
      line: { color: mine[0].color },
      customdata: points.map((values) => values.length),
      hovertemplate: "%{y:.3f}, mean of %{customdata} workloads<extra>%{fullData.name}</extra>",
    });
  }
  const slower = ours.filter((row) => row.verdict === "slower" && !row.by.peer);
  if (slower.length) {
    traces.push({
      name: "regression",
      x: slower.map((row) => label(row.run)),
      y: slower.map((row) => row.median / first.get(keyOf(row))),
      mode: "markers",
      marker: MARK,
      customdata: slower.map((row) => [row.w.name, row.ratio]),
      hovertemplate: "%{customdata[0]}<br>%{customdata[1]:.3f}× the run before<extra></extra>",
    });
  }
  const order = distinct(ours.map((row) => row.run))
    .sort((a, b) => a - b)
    .map(label);
  return {
    traces,
    layout: { xaxis: { type: "category", categoryorder: "array", categoryarray: order }, yaxis: { tickformat: ".2f" }, showlegend: true },
    empty: "No history.",
  };
}

function rooflineChart(rows) {
  const measured = rows.filter((row) => row.newest && row.status === "ok" && row.tflop > 0 && row.w.intensity > 0);
  const ops = R.ops.filter((op) => measured.some((row) => row.w.op === op));
  const symbols = ["circle", "square", "diamond", "cross", "triangle-up", "star", "hexagon", "pentagon", "triangle-down", "bowtie"];
  const traces = ops.map((op) => {
    const mine = measured.filter((row) => row.w.op === op);
    return {
      name: op,
      mode: "markers",
      x: mine.map((r) => r.w.intensity),
      y: mine.map((r) => r.tflop),
      marker: {
        color: PALETTE[R.ops.indexOf(op) % PALETTE.length],
        symbol: symbols[R.ops.indexOf(op) % symbols.length],
        size: 8,
        opacity: 0.8,
      },
      customdata: mine.map((r) => [r.w.name, r.by.label, r.gb]),
      hovertemplate: "%{customdata[0]}<br>%{customdata[1]}: %{y:.4g} TFLOP/s, %{customdata[2]:.4g} GB/s<extra></extra>",
    };
  });
  const ceilings = R.ceilings[form.elements.device.value];
  if (ceilings && traces.length) {
    const low = Math.min(...measured.map((r) => r.w.intensity)) / 2;
    Object.entries(ceilings.matmul).forEach(([dtype, rate], i) => {
      const knee = (rate * 1e3) / ceilings.copy;
      const high = Math.max(...measured.map((r) => r.w.intensity), knee) * 4;
      traces.push({
        name: `${dtype} ceiling`,
        mode: "lines",
        x: [low, knee, high],
        y: [(low * ceilings.copy) / 1e3, rate, rate],
        hoverinfo: "name",
        line: { color: css("--muted"), width: 2, dash: DASHES[i % DASHES.length] },
      });
    });
  }
  const log = (text) => ({ type: "log", title: { text }, exponentformat: "power", dtick: 1 });
  return { traces, layout: { xaxis: log("flops per byte"), yaxis: log("TFLOP/s"), showlegend: true }, empty: "No figure." };
}

// ---------------------------------------------------------------- table

const number = (value, digits = 4) => (value === null ? "–" : value.toLocaleString("en", { maximumSignificantDigits: digits }));
const times = (ratio) => (ratio === null ? "" : `${ratio.toFixed(3)}×`);
const SORTS = {
  name: (r) => r.w.name,
  implementation: (r) => r.by.label,
  median: (r) => r.median,
  spread: (r) => (r.p90 - r.p10) / r.median,
  gb: (r) => r.gb,
  tflop: (r) => r.tflop,
  floor: (r) => r.floor,
  verdict: (r) => r.ratio,
};

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function fillTable(rows) {
  let shown = rows.filter((row) => row.newest && row.status !== "unavailable");
  if (state.sort) {
    const value = SORTS[state.sort];
    const sign = state.descending ? -1 : 1;
    const missing = (v) => v === null || Number.isNaN(v);
    shown = [...shown].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (missing(x) || missing(y)) return missing(x) - missing(y);
      return sign * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
    });
  }
  const more = document.getElementById("more");
  more.hidden = state.all || shown.length <= TABLE_ROWS;
  more.textContent = `Show all ${shown.length.toLocaleString("en")}`;
  const body = document.querySelector("#table tbody");
  body.replaceChildren(
    ...shown.slice(0, state.all ? shown.length : TABLE_ROWS).map((r) => {
      const cells =
        r.status === "ok"
          ? [number(r.median), `${number(r.p10)}–${number(r.p90)}`, number(r.gb), number(r.tflop), number(r.floor, 3)]
          : [r.status, "", "", "", ""];
      const since = r.verdict && r.verdict !== "same" ? `${r.verdict} ${times(r.ratio)}` : times(r.ratio);
      const link = element("a", { href: r.w.href, textContent: r.w.name });
      return element(
        "tr",
        { className: `${r.status} ${r.verdict}` },
        element("td", {}, link),
        ...[r.by.label, ...cells, since].map((text) => element("td", { textContent: text })),
      );
    }),
  );
  for (const head of document.querySelectorAll("#table th")) {
    head.ariaSort = head.dataset.sort !== state.sort ? "none" : state.descending ? "descending" : "ascending";
  }
}

function fillAbsent() {
  const device = form.elements.device.value;
  const op = form.elements.op.value;
  const byReason = new Map();
  for (const [of, name, on, reason] of R.absent) {
    if (on !== device || (op !== "all" && op !== of)) continue;
    const key = `${name}: ${reason}`;
    byReason.set(key, [...(byReason.get(key) ?? []), of]);
  }
  const items = [...byReason].map(([text, ops]) =>
    element("li", {}, element("span", { className: "tag", textContent: distinct(ops).join(", ") }), ` ${text}`),
  );
  document
    .getElementById("absent")
    .replaceChildren(...(items.length ? items : [element("li", { textContent: "Everything that was asked for." })]));
}

// ---------------------------------------------------------------- page

const DRAWERS = { floor: floorChart, peers: peersChart, history: historyChart, roofline: (op, rows) => rooflineChart(rows) };

function show() {
  const rows = chosen();
  // A peer is set against ours even where the filter shows one of them only
  const beside = chosen(["implementation"]);
  const without = [];
  for (const article of document.querySelectorAll("article.op")) {
    const op = article.dataset.op;
    const mine = op === "*" ? rows : rows.filter((row) => row.w.op === op);
    const any = mine.some((row) => row.status === "ok");
    article.hidden = !any;
    if (!any) {
      if (op !== "*" && ["all", op].includes(form.elements.op.value)) without.push(op);
      continue;
    }
    for (const target of article.querySelectorAll(".chart")) {
      const kind = target.dataset.chart;
      const given = kind === "peers" ? beside.filter((row) => row.w.op === op) : mine;
      chart(target, () => DRAWERS[kind](op, given));
    }
  }
  const none = document.getElementById("without");
  none.hidden = without.length === 0;
  none.textContent = `The filters leave no result of ${without.join(", ")}.`;
  fillTable(rows);
  fillAbsent();
}

fillFilters();
form.addEventListener("input", () => {
  const query = new URLSearchParams(Object.keys(FIELDS).map((name) => [name, form.elements[name].value]));
  history.replaceState(null, "", `#${query}`);
  state.all = false;
  show();
});
form.addEventListener("reset", () => setTimeout(() => form.dispatchEvent(new Event("input"))));
document.getElementById("more").addEventListener("click", () => {
  state.all = true;
  fillTable(chosen());
});
for (const head of document.querySelectorAll("#table th")) {
  head.tabIndex = 0;
  const sort = () => {
    state.descending = state.sort === head.dataset.sort ? !state.descending : false;
    state.sort = head.dataset.sort;
    fillTable(chosen());
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", (event) => {
    if (event.key === "Enter") sort();
  });
}
show();
requestAnimationFrame(() =>
  requestAnimationFrame(() => {
    document.documentElement.dataset.ready = Math.round(performance.now());
  }),
);

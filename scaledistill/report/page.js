// Draws the charts of the page in the reader's theme, and the relation maps that they choose.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const NAMES = 62; // pixels beside a relation map for the tokens' names
const phone = window.matchMedia("(max-width: 800px)");

function theme() {
  const isDark = dark.matches;
  const soft = isDark ? "#9aa6b6" : "#5d6878";
  const line = isDark ? "#2a323e" : "#e2e6ec";
  // Okabe and Ito's palette, which people with colour blindness can tell apart; lighter in the dark.
  const colors = isDark
    ? ["#6cbcf0", "#f2935c", "#3ccb9d", "#e39cc5", "#f0c254", "#a9b8ff", "#d8d8d8"]
    : ["#0072b2", "#d55e00", "#009e73", "#b0508c", "#c98a00", "#4f63c9", "#555555"];
  const heat = isDark
    ? ["#171c24", "#1d3a5a", "#2767a0", "#4b9ad8", "#d5ecff"]
    : ["#f7f9fc", "#cfe1f2", "#7fb5dc", "#2b7bba", "#08306b"];
  return {
    background: null,
    font: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
    view: { stroke: null },
    range: { category: colors, heatmap: heat },
    line: { strokeWidth: 1.6, color: colors[0] },
    point: { color: colors[0], filled: true },
    rule: { color: colors[0] },
    axis: {
      labelColor: soft, titleColor: soft, gridColor: line, domainColor: line, tickColor: line,
      titleFontWeight: 400, labelFontSize: 11, titleFontSize: 12, titlePadding: 8,
    },
    legend: { labelColor: soft, titleColor: soft, labelFontSize: 12, symbolStrokeWidth: 2.5 },
  };
}

// A canvas draws thousands of points quickly; the few cells of a map are sharper as SVG.
function embed(element, spec, renderer) {
  const options = { config: theme(), actions: false, renderer };
  return vegaEmbed(element, spec, options).catch((error) => {
    element.textContent = "This chart cannot be drawn: " + error.message;
    console.error(error);
  });
}

function drawCharts() {
  data.charts.forEach((spec, number) => {
    const legendFits = phone.matches
      ? JSON.parse(JSON.stringify(spec).replaceAll('"columns":2', '"columns":1'))
      : spec;
    embed(document.getElementById("chart-" + number), legendFits, "canvas");
  });
}

// A relation map: the row of a token says how its relation is spread over all tokens.
function mapSpec(values, tokens, title, most, side, named) {
  const n = tokens.length;
  const cells = values.map((v, i) => ({ row: Math.floor(i / n), column: i % n, p: v / 1000 }));
  for (const cell of cells) {
    cell.of = tokens[cell.row];
    cell.to = tokens[cell.column];
  }
  const labels = JSON.stringify(tokens) + "[datum.value]";
  const size = Math.max(6, Math.min(11, Math.floor(side / n) - 1));
  const axis = {
    labelExpr: labels, title: null, ticks: false, domain: false, grid: false, labelOverlap: false,
    labelFontSize: size, labelLimit: NAMES - 4, labelPadding: 3,
  };
  return {
    data: { values: cells },
    title: { text: title, fontSize: 12, fontWeight: 400, anchor: "middle", offset: 4,
             color: theme().axis.labelColor },
    width: side, height: side, padding: 1,
    mark: { type: "rect" },
    encoding: {
      x: { field: "column", type: "ordinal", axis: { ...axis, labelAngle: -90 } },
      y: { field: "row", type: "ordinal", axis: named ? axis : null },
      color: { field: "p", type: "quantitative", legend: null,
               scale: { type: "pow", exponent: 0.5, domain: [0, most], zero: true } },
      tooltip: [
        { field: "of", title: "of" }, { field: "to", title: "to" },
        { field: "p", type: "quantitative", format: ".1%", title: title },
      ],
    },
  };
}

function drawMaps() {
  const box = document.getElementById("heads");
  if (!box) return;
  const [student, pair, sentence] = ["student", "pair", "sentence"].map(
    (name) => Number(document.getElementById("choose-" + name).value));
  const chosen = data.maps[student];
  const tokens = chosen.sentences[sentence];
  const name = chosen.pairs[pair];
  box.replaceChildren();
  for (const head of chosen.maps[name]) {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent =
      `${name}, relation head ${head.head}: ${head.place}, KL ${head.kl.toPrecision(2)} nats`;
    const two = document.createElement("div");
    two.className = "two";
    const sides = ["teacher", "student"].map(() => two.appendChild(document.createElement("div")));
    figure.append(caption, two);
    box.append(figure);
    const both = [head.teacher[sentence], head.student[sentence]];
    const most = Math.max(...both.flat()) / 1000;
    // The tokens' names stand beside the teacher's map only, but on a phone the maps stand one
    // above the other, each with its names.
    const stacked = phone.matches, width = two.clientWidth;
    const side = Math.floor(stacked ? width - NAMES - 8 : (width - NAMES - 16) / 2);
    two.style.gridTemplateColumns = stacked
      ? "minmax(0, 1fr)" : `${side + NAMES + 8}px minmax(0, 1fr)`;
    ["teacher", "student"].forEach((title, place) => {
      const named = stacked || title === "teacher";
      embed(sides[place], mapSpec(both[place], tokens, title, most, side, named), "svg");
    });
  }
}

function fill(id, labels) {
  const select = document.getElementById(id);
  const before = select.value;
  select.replaceChildren(...labels.map((label, number) => new Option(label, number)));
  if (before && Number(before) < labels.length) select.value = before;
  select.parentElement.hidden = labels.length < 2;
}

function setUpMaps() {
  if (!document.getElementById("heads")) return;
  fill("choose-student", data.maps.map((each) => each.label));
  const own = () => {
    const chosen = data.maps[Number(document.getElementById("choose-student").value)];
    fill("choose-pair", chosen.pairs);
    fill("choose-sentence", chosen.sentences.map((tokens) => tokens.join(" ")));
    drawMaps();
  };
  document.getElementById("choose-student").addEventListener("change", own);
  for (const name of ["pair", "sentence"])
    document.getElementById("choose-" + name).addEventListener("change", drawMaps);
  own();
  const box = document.getElementById("heads");
  drawnWidth = box.clientWidth;
  watcher.observe(box);
}

// The maps do not follow the width of the page by themselves.
let drawnWidth = 0;
const watcher = new ResizeObserver(([entry]) => {
  if (Math.abs(entry.contentRect.width - drawnWidth) < 1) return;
  drawnWidth = entry.contentRect.width;
  drawMaps();
});
dark.addEventListener("change", () => { drawCharts(); drawMaps(); });
phone.addEventListener("change", () => { drawCharts(); drawMaps(); });
drawCharts();
setUpMaps();

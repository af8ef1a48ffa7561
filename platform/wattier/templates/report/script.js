"use strict";
// Without this script the tables still tell everything: figures, sorting and the choice of day or night are all it adds.
const root = document.documentElement, wishes = matchMedia("(prefers-color-scheme: dark)");
const themes = JSON.parse(document.getElementById("figure-themes").textContent);
const plots = [...document.querySelectorAll(".plot")];
const theme = () => root.dataset.theme ?? (wishes.matches ? "night" : "day");
let printing = false, drawing = null;

function template() { return themes[printing ? "day" : theme()]; }

async function unpack(id) {
  const packed = Uint8Array.from(atob(document.getElementById(id).textContent), letter => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

function loadPlotly() {
  drawing ??= unpack("plotly-packed").then(source => {
    const script = document.createElement("script");
    script.textContent = source;
    document.head.append(script);
  });
  return drawing;
}

function draw(plot) {
  if (plot.dataset.drawn) return;
  plot.dataset.drawn = "yes";
  const figure = JSON.parse(document.getElementById(plot.dataset.figure).textContent);
  const narrow = plot.clientWidth < 480;
  figure.layout.template = template();
  if (narrow) {
    figure.layout.font = {size: 12};
    for (const trace of figure.data) if (trace.mode === "markers+text") trace.mode = "markers";  // names would overlap
  }
  figure.layout.dragmode = narrow ? false : "zoom";  // a finger that scrolls the page does not zoom
  Plotly.newPlot(plot, figure.data, figure.layout, {responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]]});
  plot.querySelector("svg")?.setAttribute("aria-hidden", "true");  // its words are in the label and the tables
}

function redress() {
  for (const plot of plots) if (plot.dataset.drawn) Plotly.relayout(plot, {template: template()});
}

// What is out of sight is drawn while nothing else is to be done, one figure at a time, so that print has all of them.
const idle = () => new Promise(go => ("requestIdleCallback" in window ? requestIdleCallback(go, {timeout: 500}) : setTimeout(go, 50)));
async function drawAll() {
  await loadPlotly();
  for (const plot of plots) {
    if (!plot.dataset.drawn) await idle();
    draw(plot);
  }
}

if (plots.length && "DecompressionStream" in window) {
  const seen = new IntersectionObserver(async entries => {
    const near = entries.filter(entry => entry.isIntersecting).map(entry => entry.target);
    if (!near.length) return;
    await loadPlotly();
    near.forEach(plot => { seen.unobserve(plot); draw(plot); });
  }, {rootMargin: "900px"});
  plots.forEach(plot => seen.observe(plot));
  addEventListener("load", drawAll);
} else {
  plots.forEach(plot => { plot.textContent = "This browser is too old to draw the figure; the tables hold its numbers."; plot.style.minHeight = 0; });
}

wishes.addEventListener("change", redress);
addEventListener("beforeprint", () => { printing = true; document.querySelectorAll("details.print").forEach(part => { part.open = true; }); if (window.Plotly) { plots.forEach(draw); redress(); plots.forEach(plot => Plotly.Plots.resize(plot)); } });
addEventListener("afterprint", () => { printing = false; if (window.Plotly) redress(); });

const button = document.querySelector("button.theme");
function label() { button.textContent = theme() === "night" ? "Light colours" : "Dark colours"; }
button.hidden = false;
button.addEventListener("click", () => { root.dataset.theme = theme() === "night" ? "day" : "night"; label(); redress(); });
wishes.addEventListener("change", label);
label();

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const sorter = document.createElement("button");
    sorter.type = "button";
    sorter.append(...head.childNodes);
    head.append(sorter);
    sorter.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = row => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
      const rows = [...table.tBodies[0].rows].sort((one, two) => {
        const a = value(one), b = value(two);
        if (a === "" || b === "") return (a === "") - (b === "");
        const order = isNaN(a) || isNaN(b) ? a.localeCompare(b, undefined, {numeric: true}) : a - b;
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}

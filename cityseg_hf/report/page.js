"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const one = (selector) => document.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const phone = window.matchMedia("(max-width: 640px)");
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// ---- Tables: a click, Enter or Space on a head sorts; again turns round. What has no value stays last.

function sort(head) {
  const column = [...head.parentNode.children].indexOf(head);
  const words = head.classList.contains("word");
  const before = head.getAttribute("aria-sort");
  const ascending = before ? before === "descending" : words;
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const body = head.closest("table").tBodies[0];
  const value = (row) => row.cells[column].dataset.value;
  const rows = [...body.rows];
  const numeric = rows.every((row) => value(row) === "" || !Number.isNaN(Number(value(row))));
  const order = (a, b) => (numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true }));
  rows.sort((first, second) => {
    const [a, b] = [value(first), value(second)];
    if (a === "" || b === "") return (a === "") - (b === "");
    return ascending ? order(a, b) : order(b, a);
  });
  body.append(...rows);
}

for (const head of all("th.word, th.number")) head.firstElementChild.addEventListener("click", () => sort(head));

// ---- Plots: data and shape come from Python, colours from the style of the page, whichever is on.

const shown = () => all("#shown input").map((box) => box.checked);

function visible(name) {
  const figure = data.figures[name];
  if (name === "classes") {
    const count = data.traces.length;
    const chosen = [Number(one("#bars").value), one("#marks").value === "" ? -1 : count + Number(one("#marks").value)];
    return figure.data.map((_, number) => chosen.includes(number));
  }
  if (name === "confusion") return figure.data.map((_, number) => number === Number(one("#confused").value));
  const boxes = shown();
  const found = figure.data.map(() => false);
  data.traces.forEach((traces, configuration) => traces.forEach((trace) => (found[trace] = boxes[configuration])));
  return found;
}

function looks(name, trace) {
  if (name === "classes" && trace.type === "bar") {
    return { marker: { color: color("--bar") }, error_x: { ...trace.error_x, color: color("--ink") } };
  }
  if (name === "classes") {
    return { marker: { ...trace.marker, color: color("--mark"), line: { width: 3, color: color("--mark") } } };
  }
  if (name === "confusion") {
    // Small shares are what one looks for: they get most of the colours.
    const stops = [0, 0.01, 0.05, 0.2, 0.5, 1].map((share, number) => [share, color(`--heat-${number}`)]);
    return { colorscale: stops, texttemplate: phone.matches ? "" : "%{text}", textfont: { size: 10 } };
  }
  return {};
}

function axis(given) {
  const grid = color("--line");
  return {
    gridcolor: grid,
    linecolor: grid,
    zerolinecolor: grid,
    tickcolor: grid,
    ...given,
    title: { ...given.title, font: { size: 12, color: color("--muted") }, standoff: 6 },
    tickfont: { size: phone.matches ? 10 : 12 },
  };
}

function layout(name, figure) {
  const made = {
    ...figure.layout,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("--ink") },
    hoverlabel: { bgcolor: color("--card"), bordercolor: color("--line"), font: { color: color("--ink"), size: 12 }, align: "left" },
    margin: { l: 48, r: 12, t: 8, b: 40 },
    // A finger that scrolls the page must not zoom a plot.
    dragmode: phone.matches ? false : "zoom",
    xaxis: axis(figure.layout.xaxis),
    yaxis: axis(figure.layout.yaxis),
  };
  if (name === "classes") {
    made.margin = { l: 8, r: 24, t: 28, b: 8 };
    if (one("#order").value === "scores") {
      const { x, y } = figure.data[Number(one("#bars").value)];
      const order = y.map((_, number) => number).sort((a, b) => (x[b] ?? -1) - (x[a] ?? -1));
      Object.assign(made.yaxis, { categoryorder: "array", categoryarray: order.map((number) => y[number]) });
    }
  }
  if (name === "confusion") {
    made.margin = { l: 8, r: 8, t: 8, b: 8 };
    if (phone.matches) for (const side of [made.xaxis, made.yaxis]) Object.assign(side, { title: {}, tickfont: { size: 8 } });
  }
  return made;
}

function draw(name) {
  const figure = data.figures[name];
  const place = one(`.plot[data-figure="${name}"]`);
  const seen = visible(name);
  const traces = figure.data.map((trace, number) => ({ ...trace, ...looks(name, trace), visible: seen[number] }));
  Plotly.react(place, traces, layout(name, figure), { responsive: true, displayModeBar: false });
}

const curves = ["miou", "loss", "rate"];
const drawAll = () => Object.keys(data.figures).forEach(draw);
drawAll();
dark.addEventListener("change", drawAll);
phone.addEventListener("change", drawAll);

// ---- Which runs the curves show.

one("#shown").addEventListener("change", () => curves.forEach(draw));
for (const button of all("[data-show]")) {
  button.addEventListener("click", () => {
    const count = button.dataset.show === "all" ? Infinity : Number(button.dataset.show);
    // Of those that the filter leaves, the best stand first.
    const boxes = all("#shown input");
    const listed = boxes.filter((box) => !box.closest("li").hidden);
    boxes.forEach((box) => (box.checked = listed.indexOf(box) >= 0 && listed.indexOf(box) < count));
    curves.forEach(draw);
  });
}
one("#filter").addEventListener("input", (event) => {
  const words = event.target.value.toLowerCase().split(/\s+/);
  for (const row of all("#shown li")) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
});

// ---- Classes and confusion.

for (const id of ["#bars", "#marks", "#order"]) one(id).addEventListener("change", () => draw("classes"));
one("#confused")?.addEventListener("change", (event) => {
  draw("confusion");
  for (const list of all(".pairs ol")) list.hidden = list.dataset.run !== event.target.value;
});

// ---- Pictures and commands.

for (const view of all(".view")) {
  view.addEventListener("click", () => {
    const [image, line] = one("#large").children;
    image.src = view.firstElementChild.src;
    image.alt = line.textContent = view.firstElementChild.alt;
    one("#large").showModal();
  });
}
one("#large").addEventListener("click", () => one("#large").close());

for (const button of all(".copy")) {
  button.addEventListener("click", async () => {
    const text = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(text.textContent);
    } catch {
      // Not every browser lends its clipboard to a file: then the selection does.
      getSelection().selectAllChildren(text);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}

// Films: one clock for all of them. Tables: a click on a heading sorts. Works on what the page holds; fetches nothing.
"use strict";
{
  const films = () => document.getAnimations().filter((a) => a.effect.target.classList.contains("film"));
  // All films show the moment `time` of the page's clock, so that none starts when its picture happens to be ready.
  const inStep = (time) => films().forEach((a) => { a.currentTime = time; });
  const now = () => films()[0]?.currentTime ?? 0;

  const setPaused = (paused) => {
    document.documentElement.classList.toggle("paused", paused);
    inStep(now());
    document.querySelectorAll(".play").forEach((button) => {
      button.textContent = paused ? "Play" : "Pause";
      button.setAttribute("aria-pressed", String(!paused));
    });
  };

  const orders = {
    index: (a, b) => a.dataset.index - b.dataset.index,
    worst: (a, b) => a.dataset.psnr - b.dataset.psnr || orders.index(a, b),
    best: (a, b) => b.dataset.psnr - a.dataset.psnr || orders.index(a, b),
  };
  // Infinity - Infinity is no number: pairs that are identical keep their order.
  const sortPairs = (gallery, order) => {
    const time = now();
    const pairs = [...gallery.querySelectorAll(".pair")];
    pairs.sort((a, b) => orders[order](a, b) || orders.index(a, b));
    gallery.querySelector(".pairs").append(...pairs);
    inStep(time);
  };

  document.querySelectorAll(".gallery").forEach((gallery) => {
    gallery.querySelector(".play")?.addEventListener("click", () =>
      setPaused(!document.documentElement.classList.contains("paused")));
    gallery.querySelector(".sort").addEventListener("change", (event) => sortPairs(gallery, event.target.value));
    gallery.querySelector(".factor").addEventListener("change", (event) => {
      gallery.style.setProperty("--factor", event.target.value);
      gallery.querySelectorAll(".times").forEach((text) => { text.textContent = event.target.value; });
    });
  });
  const start = () => { inStep(0); setPaused(matchMedia("(prefers-reduced-motion: reduce)").matches); };
  document.readyState === "complete" ? start() : addEventListener("load", start);

  // The number that a cell begins with: "1.90x", "+3.7 [-0.6, +8.0]", "24,576"; null for a text or nothing.
  const numberIn = (text) => {
    const found = text.replaceAll(",", "").match(/^[-+−]?\d+(\.\d+)?(e[-+]?\d+)?/);
    return found ? Number(found[0].replace("−", "-")) : null;
  };
  const sortRows = (table, column, sign) => {
    const rows = [...table.tBodies[0].rows].map((row) => {
      const text = row.cells[column]?.textContent.trim() ?? "";
      return { row, text, number: numberIn(text) };
    });
    rows.sort((a, b) => {
      if (a.number !== null && b.number !== null) return sign * (a.number - b.number);
      if (a.number !== null || b.number !== null) return a.number === null ? 1 : -1; // no number: last, both ways
      return sign * a.text.localeCompare(b.text);
    });
    table.tBodies[0].append(...rows.map(({ row }) => row));
  };
  document.querySelectorAll("table.sortable").forEach((table) => {
    [...table.tHead.rows[0].cells].forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        const before = heading.getAttribute("aria-sort");
        const first = column === 0 ? "ascending" : "descending";
        const next = before === null ? first : before === "ascending" ? "descending" : "ascending";
        [...table.tHead.rows[0].cells].forEach((other) => other.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", next);
        sortRows(table, column, next === "ascending" ? 1 : -1);
      });
    });
  });

  // Charts: Plotly draws what lies in the page, in lighter colours on a dark one.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const lighter = { "#0072B2": "#56B4E9", "#333333": "#C8CED4", "rgba(0,114,178,": "rgba(86,180,233," };
  const draw = () => document.querySelectorAll(".chart").forEach((place) => {
    let text = place.dataset.figure;
    if (dark.matches) for (const [from, to] of Object.entries(lighter)) text = text.replaceAll(from, to);
    const figure = JSON.parse(text);
    Plotly.react(place, figure.data, figure.layout, { responsive: true, displayModeBar: false });
  });
  if (document.querySelector(".chart")) {
    draw();
    dark.addEventListener("change", draw);
  }
}

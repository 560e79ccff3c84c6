"use strict";
// Writes the numbers of the layer under the pointer above a picture, and sorts tables by a column.

function readOff(chart) {
  const plot = chart.querySelector(".plot"), readout = chart.querySelector(".readout");
  const columns = [...plot.querySelectorAll(".column")];
  const titles = columns.map((column) => column.querySelector("title").textContent);
  if (!columns.length) return;
  let at = -1;
  columns.forEach((column) => column.querySelector("title").remove());

  function show(index) {
    if (columns[at]) columns[at].classList.remove("chosen");
    at = index;
    const words = at < 0 ? ["point at a layer to read its numbers"] : titles[at].split("\n");
    if (at >= 0) columns[at].classList.add("chosen");
    readout.replaceChildren(...words.map((text) => {
      const item = document.createElement("span");
      item.textContent = text;
      return item;
    }));
  }

  columns.forEach((column, index) => column.addEventListener("pointerenter", () => show(index)));
  plot.addEventListener("pointerleave", () => show(-1));
  plot.tabIndex = 0;
  plot.addEventListener("blur", () => show(-1));
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    show(Math.min(Math.max(at + move, 0), columns.length - 1));
  });
  show(-1);
}

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const original = [...body.rows];

  function sort(head, index) {
    const isNumber = head.classList.contains("n");
    const before = head.getAttribute("aria-sort");
    const order = { null: isNumber ? "descending" : "ascending", ascending: "descending", descending: "ascending" }[before];
    const sign = order === "ascending" ? 1 : -1;
    const value = (row) => {
      const text = row.cells[index].textContent.replaceAll(",", "");
      return isNumber ? (text === "" || Number.isNaN(+text) ? -Infinity : +text) : text;
    };
    const rows = original.map((row) => [value(row), row]);
    rows.sort(([a], [b]) => (a === b ? 0 : a < b ? -sign : sign));
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    body.replaceChildren(...rows.map(([, row]) => row));
  }

  heads.forEach((head, index) => {
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(head, index));
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(head, index); }
    });
  });
}

document.documentElement.classList.add("scripted");
document.querySelectorAll("[data-columns]").forEach(readOff);
document.querySelectorAll("table.sorted").forEach(sortable);

"use strict";
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, table = head.closest("table"), body = table.tBodies[0];
    const column = [...head.parentElement.children].indexOf(head);
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of table.querySelectorAll("th[aria-sort]")) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    const value = (row) => row.children[column].dataset.value ?? row.children[column].textContent;
    const compare = (a, b) => {
      const x = Number(value(a)), y = Number(value(b));
      return sign * (Number.isNaN(x) || Number.isNaN(y) ? value(a).localeCompare(value(b)) : x - y);
    };
    body.append(...[...body.rows].sort(compare));
  });
}
const map = document.getElementById("map"), told = document.getElementById("told");
if (map && told) {
  const { names, rows } = JSON.parse(document.getElementById("map-data").textContent);
  map.addEventListener("mousemove", (event) => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(map.getScreenCTM().inverse());
    const row = Math.floor(point.y / map.dataset.tall);
    const column = Math.floor((point.x - map.dataset.left) / map.dataset.wide);
    const cell = rows[row]?.[column];
    if (cell === undefined) return;
    const how = cell === "0" ? "in full precision" : cell === "q" ? "quantized" : `quantized, impact ${cell} of 5`;
    told.textContent = `layer ${names[row]}, epoch ${column + 1}: ${how}`;
  });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));

"use strict";
// Tables: click a heading to sort, type to filter, choose columns, save as CSV. The CSV file is made
// from the table, without the network.
for (const tools of document.querySelectorAll(".tools")) {
  const table = document.getElementById(tools.dataset.table);
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];

  function valueOf(row, column) {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.innerText.trim() : cell.dataset.value;
  }

  function compare(a, b) {
    if (a === "" || b === "") return (a === "") - (b === "");
    return isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
  }

  headings.forEach((heading, column) => {
    heading.tabIndex = 0;
    function sort() {
      const falling = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const rows = [...body.rows].sort((a, b) => {
        const [first, second] = [valueOf(a, column), valueOf(b, column)];
        // Cells without a measurement stay at the end in both orders.
        return (falling && first !== "" && second !== "" ? -1 : 1) * compare(first, second);
      });
      body.append(...rows);
    }
    heading.addEventListener("click", sort);
    heading.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });

  const word = tools.querySelector("input[type=search]");
  const language = tools.querySelector("select");
  function filter() {
    const wanted = language ? language.value : "";
    for (const row of body.rows) {
      const hasWord = row.innerText.toLowerCase().includes(word.value.toLowerCase());
      const spoken = row.dataset.language;
      row.hidden = !hasWord || Boolean(wanted && spoken && spoken !== wanted);
    }
  }
  word.addEventListener("input", filter);
  if (language) language.addEventListener("change", filter);

  for (const box of tools.querySelectorAll("input[type=checkbox]")) {
    box.addEventListener("change", () => {
      for (const row of table.rows) row.cells[Number(box.value)].hidden = !box.checked;
    });
  }

  const link = tools.querySelector("a[download]");
  link.addEventListener("click", () => {
    const quoted = (text) => `"${text.replaceAll('"', '""')}"`;
    const lines = [headings.map((heading) => quoted(heading.dataset.title))];
    for (const row of body.rows) {
      if (!row.hidden) lines.push(headings.map((_, column) => quoted(valueOf(row, column))));
    }
    const text = lines.map((cells) => cells.join(",")).join("\r\n");
    link.href = `data:text/csv;charset=utf-8,${encodeURIComponent(text)}`;
  });
}

// Charts are drawn while the page loads, before the grid has its final width. The observer reports
// only when a frame is painted. A page in the background paints none, so the end of loading fits
// every chart once.
function fit(figure) {
  Plotly.Plots.resize(figure.querySelector(".js-plotly-plot"));
}
const figures = document.querySelectorAll("figure");
const observer = new ResizeObserver((entries) => {
  for (const entry of entries) fit(entry.target);
});
for (const figure of figures) observer.observe(figure);
window.addEventListener("load", () => figures.forEach(fit));

// Another policy: the page has its answer as a template, chosen as by `gteopt choose`.
const policies = document.getElementById("policy");
function mark(statuses) {
  const isPicked = (name) => (statuses[name] || [""])[0].startsWith("picked");
  for (const row of document.querySelectorAll("#table-variants tbody tr")) {
    const [kind, words] = statuses[row.cells[0].dataset.value];
    row.className = kind;
    row.cells[0].querySelector("small").textContent = words;
  }
  for (const chart of document.querySelectorAll(".js-plotly-plot")) {
    chart.data.forEach((trace, number) => {
      const { variant, variants, own, picked } = trace.meta || {};
      if (variant !== undefined) {
        const [color, symbol] = isPicked(variant) ? picked : own;
        const size = isPicked(variant) ? 15 : 11;
        const marker = { "marker.color": color, "marker.symbol": symbol, "marker.size": size };
        Plotly.restyle(chart, marker, [number]);
      } else if (variants !== undefined) {
        const colours = variants.map((name) => (isPicked(name) ? picked : own));
        Plotly.restyle(chart, { "marker.color": [colours] }, [number]);
      }
    });
  }
}
if (policies) {
  policies.addEventListener("change", () => {
    const answer = document.querySelector(`template[data-policy="${policies.value}"]`);
    for (const part of answer.content.children) {
      const place = document.querySelector(`[data-part="${part.dataset.part}"]`);
      place.replaceChildren(...part.cloneNode(true).childNodes);
    }
    mark(JSON.parse(answer.dataset.statuses));
  });
}

"use strict";
// Names the points of each scatter plot. How much room there is is known only here: the plot is as
// wide as the reader's window. Each label takes the nearest free place around its point; a name
// that finds none gives way to the variant's number in the table.
function placeLabels(holder) {
  const plot = holder.querySelector(".js-plotly-plot");
  const layer = holder.querySelector(".labels");
  const origin = layer.getBoundingClientRect();
  const area = relative(plot.querySelector(".nsewdrag").getBoundingClientRect());
  const trace = plot.data[plot.data.length - 1];
  const points = [...plot.querySelectorAll(".points path.point")].map((path) => {
    const rect = relative(path.getBoundingClientRect());
    return { x: (rect.left + rect.right) / 2, y: (rect.top + rect.bottom) / 2, rect };
  });
  const taken = points.map((point) => point.rect);
  layer.replaceChildren();
  points.forEach((point, index) => {
    const [name, number] = trace.customdata[index];
    const label = document.createElement("span");
    layer.append(label);
    if (trace.marker.size[index] > 10) label.className = "picked";
    for (const text of [name, String(number)]) {
      label.textContent = text;
      label.title = name;
      const place = freePlace(point, label.offsetWidth, label.offsetHeight);
      if (!place && text === name) continue;
      const box = place || boxAround(point, label.offsetWidth, label.offsetHeight, 0, 9);
      taken.push(box);
      label.style.left = `${box.left}px`;
      label.style.top = `${box.top}px`;
      label.style.width = `${box.right - box.left}px`;
      if (place && place.distance > 14) layer.append(leader(point, box));
      break;
    }
  });

  function relative(rect) {
    return {
      left: rect.left - origin.left, right: rect.right - origin.left,
      top: rect.top - origin.top, bottom: rect.bottom - origin.top,
    };
  }

  function freePlace(point, width, height) {
    for (let distance = 9; distance <= 75; distance += 6) {
      for (const angle of [0, 180, 270, 90, 315, 45, 225, 135, 290, 70, 250, 110]) {
        const box = boxAround(point, width, height, angle, distance);
        const inside = box.left >= area.left && box.right <= area.right
          && box.top >= area.top && box.bottom <= area.bottom;
        if (inside && !taken.some((other) => overlap(box, other))) return { ...box, distance };
      }
    }
    return null;
  }

  function boxAround(point, width, height, angle, distance) {
    // The middle of the side (or the corner) that faces the point lies `distance` from it.
    const dx = Math.cos((angle * Math.PI) / 180), dy = Math.sin((angle * Math.PI) / 180);
    const left = point.x + dx * distance + ((Math.sign(round(dx)) - 1) / 2) * width;
    const top = point.y + dy * distance + ((Math.sign(round(dy)) - 1) / 2) * height;
    return { left, top, right: left + width, bottom: top + height };
  }

  function round(value) { return Math.round(value * 1000) / 1000; }

  function overlap(a, b) {
    return a.left < b.right + 2 && b.left < a.right + 2 && a.top < b.bottom && b.top < a.bottom;
  }

  function leader(point, box) {
    const x = Math.min(Math.max(point.x, box.left), box.right);
    const y = Math.min(Math.max(point.y, box.top), box.bottom);
    const line = document.createElement("i");
    line.style.left = `${point.x}px`;
    line.style.top = `${point.y}px`;
    line.style.width = `${Math.hypot(x - point.x, y - point.y)}px`;
    line.style.transform = `rotate(${Math.atan2(y - point.y, x - point.x)}rad)`;
    return line;
  }
}

for (const holder of document.querySelectorAll(".labelled")) {
  holder.querySelector(".js-plotly-plot").on("plotly_afterplot", () => placeLabels(holder));
}
// Charts are drawn while the page is still being read, when the grid has not its final width yet.
// The observer reports only when a frame is painted, which a page in the background never is, so
// the end of loading fits every chart once.
function fit(figure) {
  Plotly.Plots.resize(figure.querySelector(".js-plotly-plot"));
}
const figures = document.querySelectorAll("figure");
const observer = new ResizeObserver((entries) => {
  for (const entry of entries) fit(entry.target);
});
for (const figure of figures) observer.observe(figure);
window.addEventListener("load", () => figures.forEach(fit));

"use strict";
(() => {
  // Tables: a click on a column's head sorts by it, a second one the other way round.
  const sortBy = (table, column, down) => {
    const value = (row) => row.cells[column].dataset.order;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const [p, q] = [Number(x), Number(y)];
      const order = Number.isNaN(p) || Number.isNaN(q)
        ? x.localeCompare(y, "en", {numeric: true}) : p - q;
      return down ? -order : order;
    };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(compare));
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
    heads.forEach((head, column) => {
      if (!head.textContent) return;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        sortBy(table, column, down);
      });
    });
  }

  // Figures: plotly is in the page compressed. A figure in a closed element has no width, so it is
  // drawn when the element is opened.
  const packed = document.getElementById("plotly");
  if (!packed) return;
  const unpack = async () => {
    const bytes = Uint8Array.from(atob(packed.textContent.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    packed.remove();
  };
  const draw = (element) => {
    if (element.dataset.drawn || element.closest("details:not([open])")) return;
    element.dataset.drawn = "yes";
    const {data, layout, config} = JSON.parse(element.nextElementSibling.textContent);
    element.textContent = "";
    Plotly.newPlot(element, data, layout, config);
  };
  const drawAll = (parent) => parent.querySelectorAll(".plot").forEach(draw);
  unpack().then(() => {
    drawAll(document);
    document.addEventListener("toggle", (event) => drawAll(event.target), true);
  }).catch((error) => {
    for (const element of document.querySelectorAll(".plot")) {
      element.textContent = `The figure cannot be drawn; it needs a browser of 2023 or later (${error.message}).`;
    }
  });
})();

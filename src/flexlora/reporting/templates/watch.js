"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  // Text that has not changed is not set again, so that a selection stays.
  const say = (node, text) => { if (node.textContent !== text) node.textContent = text; };
  const mark = (node, state) => {
    if (node.dataset.state !== state) node.dataset.state = state;
  };
  const add = (table, row) => {
    const cell = row.insertCell();
    cell.dataset.label = table.tHead.rows[0].cells[cell.cellIndex].textContent;
    return cell;
  };
  const fill = (table, rows) => {
    const body = table.tBodies[0];
    while (body.rows.length > rows.length) body.deleteRow(-1);
    rows.forEach(({state, cells}, i) => {
      const row = i < body.rows.length ? body.rows[i] : body.insertRow();
      mark(row, state);
      cells.forEach((text, k) => say(k < row.cells.length ? row.cells[k] : add(table, row), text));
    });
  };
  const draw = (curve, text) => {
    at("loss").hidden = !curve.top;
    for (const name of ["top", "bottom", "first", "last"]) say(at(name), curve[name]);
    say(at("curve_text"), text);
    curve.lines.forEach(({last, line, points}, i) => {
      const entry = at("legend").children[i];
      entry.hidden = !last;
      say(entry.lastElementChild, last);
      for (const [kind, path] of [["line", line], ["points", points]])
        at("chart").querySelector(`.${kind}[data-line="${i}"]`).setAttribute("d", path);
    });
  };
  const show = (page) => {
    document.title = page.title;
    mark(at("state"), page.state.kind);
    say(at("state"), page.state.text);
    say(at("course"), page.progress.text);
    at("progress").value = page.progress.share;
    for (const name of ["about", "count", "more", "updated"]) say(at(name), page[name]);
    page.facts.forEach((fact, i) =>
      fact.forEach((text, k) => say(at("facts").children[i].children[k], text)));
    for (const name of ["scores", "clients", "events"]) {
      at(name).dataset.empty = page.empty[name];
      fill(at(name), page[name]);
    }
    at("link").hidden = !page.report;
    if (page.report) at("report").setAttribute("href", page.report);
    draw(page.curve, page.curve_text);
  };
  const latest = async () => {
    const response = await fetch("status.json", {signal: AbortSignal.timeout(10000)});
    if (!response.ok) throw new Error(await response.text());
    return (await response.json()).shown;
  };
  const poll = async () => {
    let fault = "";
    try {
      show(await latest());
    } catch (error) {
      // The browser's own errors end without a full stop.
      fault = `Not updated: ${error.message.replace(/\.?$/, ".")} The page shows the last state received.`;
    }
    say(at("fault"), fault);
    at("fault").hidden = !fault;
    setTimeout(poll, 2000);
  };
  poll();
})();

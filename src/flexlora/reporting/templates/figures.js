// A figure in a closed element is drawn without its width, so it is drawn again when shown.
document.addEventListener("toggle", (event) => {
  if (!event.target.open) return;
  for (const plot of event.target.querySelectorAll(".js-plotly-plot")) Plotly.Plots.resize(plot);
}, true);
